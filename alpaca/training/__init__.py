"""A run of train.py around its Trainer.

trainer         Hugging Face's Trainer with rows packed and checkpoints whole
legacy_flags    2023's command line on today's stack
preflight       checks before a run that would fail after hours
memory          what a run needs, and what fits
checkpoint      checkpoint-N, there when it is complete
resume          what must not change when a run is resumed
metrics         speed, memory, the console
stop            SIGTERM and Ctrl-C
nonfinite       a loss that is not finite stops the run
model_card      README.md of the model
"""

"""A model to train, and how it lies on its devices.

load          weights and tokenizer, as train.py's flags ask for them
lora          LoRA matrices on a frozen base
device        where and in which dtype to compute; 8 and 4 bits
embeddings    embeddings that fit a tokenizer
fsdp          FSDP, also on CPU ranks, and its checkpoints
deepspeed     ZeRO-3 with float32 kept exact
compile       torch.compile, layer by layer
"""

"""Measuring a model.

harness          lm-eval's tasks, with the published groups
harness_tasks    group files, and a rehearsal of every task
judge            an LLM as judge of two answers
bleu_rouge       BLEU and ROUGE against references
row_losses       the loss of single rows, before and after training
before_after     what a model learned and forgot: the same measures of base, checkpoints and tuned model
"""

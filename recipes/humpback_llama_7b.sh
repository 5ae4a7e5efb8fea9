#!/usr/bin/env bash
# M0, M1 and M2 of instruction backtranslation (arXiv 2308.06259), LLaMA-7B: batch 32 (8 below 3,000 rows:
# --gradient_accumulation_steps), lr 1e-5 falling in a line to 9e-6, weight decay 0.1, all as published. Not published,
# so ours: 3 epochs, no warmup, 2048 tokens. The paper's dropout of 0.1 is left out: LLaMA as published has none.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
MODEL=${MODEL:-huggyllama/llama-7b}
DATA=${DATA:-./seed.json}
OUTPUT=${OUTPUT:-output/M0}
NPROC=${NPROC:-4}
BATCH=32
PER_DEVICE=2
source "$(dirname "$0")/common.sh"

train --learning_rate 1e-5 --num_train_epochs 3 --model_max_length 2048 --save_steps 2000 \
    --weight_decay 0.1 --lr_scheduler_type "polynomial" --lr_scheduler_kwargs '{"lr_end": 9e-6, "power": 1.0}' \
    "${FULL_SHARD[@]}" LlamaDecoderLayer \
    "$@"

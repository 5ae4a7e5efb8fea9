#!/usr/bin/env bash
# Alpaca with LoRA on one GPU of 24 GB, LLaMA-7B and its like. Published in 2023 (tloen/alpaca-lora): r=8, alpha=16,
# dropout 0.05 on q_proj and v_proj, batch 128, lr 3e-4, 3 epochs, cleaned Alpaca data. Ours: 512 tokens (there 256),
# loss on the answers only, the base in bf16 (8 bits), warmup and cosine. On 12 GB add --load_in_4bit True.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
MODEL=${MODEL:-huggyllama/llama-7b}
DATA=${DATA:-yahma/alpaca-cleaned}
OUTPUT=${OUTPUT:-output/alpaca-7b-lora}
NPROC=${NPROC:-1}
BATCH=128
PER_DEVICE=4
source "$(dirname "$0")/common.sh"

train --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules q_proj,v_proj \
    --learning_rate 3e-4 --num_train_epochs 3 --model_max_length 512 --save_steps 200 \
    "${COSINE[@]}" \
    "$@"

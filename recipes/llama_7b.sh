#!/usr/bin/env bash
# Stanford Alpaca, LLaMA-7B: 4 x A100 80 GB, batch 128, 3 epochs, lr 2e-5, 512 tokens.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
MODEL=${MODEL:-huggyllama/llama-7b}
DATA=${DATA:-./alpaca_data.json}
OUTPUT=${OUTPUT:-output/alpaca-7b}
NPROC=${NPROC:-4}
BATCH=128
PER_DEVICE=4
source "$(dirname "$0")/common.sh"

train --learning_rate 2e-5 --num_train_epochs 3 --model_max_length 512 --save_steps 2000 \
    "${COSINE[@]}" \
    "${FULL_SHARD[@]}" LlamaDecoderLayer \
    "$@"

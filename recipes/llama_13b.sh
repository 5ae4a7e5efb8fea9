#!/usr/bin/env bash
# Stanford Alpaca, LLaMA-13B: batch 128, 5 epochs, lr 1e-5, 512 tokens. On 4 x 80 GB add: --fsdp "full_shard auto_wrap offload"
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
MODEL=${MODEL:-huggyllama/llama-13b}
DATA=${DATA:-./alpaca_data.json}
OUTPUT=${OUTPUT:-output/alpaca-13b}
NPROC=${NPROC:-4}
BATCH=128
PER_DEVICE=4
source "$(dirname "$0")/common.sh"

train --learning_rate 1e-5 --num_train_epochs 5 --model_max_length 512 --save_steps 2000 \
    "${COSINE[@]}" \
    "${FULL_SHARD[@]}" LlamaDecoderLayer \
    "$@"

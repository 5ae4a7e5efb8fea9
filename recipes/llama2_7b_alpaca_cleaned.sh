#!/usr/bin/env bash
# Llama-2-7b-alpaca-cleaned: Stanford's flags on the cleaned Alpaca data.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
DATA=${DATA:-yahma/alpaca-cleaned}
OUTPUT=${OUTPUT:-output/llama-2-7b-alpaca-cleaned}
NPROC=${NPROC:-4}
BATCH=128
PER_DEVICE=4
source "$(dirname "$0")/common.sh"

train --learning_rate 2e-5 --num_train_epochs 3 --model_max_length 512 --save_steps 2000 \
    "${COSINE[@]}" \
    "${FULL_SHARD[@]}" LlamaDecoderLayer \
    "$@"

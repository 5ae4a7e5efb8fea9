#!/usr/bin/env bash
# claude2-alpaca-13B: batch 128, 5 epochs, lr 1e-5, 2048 tokens, weight decay 0.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
MODEL=${MODEL:-meta-llama/Llama-2-13b-hf}
DATA=${DATA:-umd-zhou-lab/claude2_alpaca}
OUTPUT=${OUTPUT:-output/claude2-alpaca-13b}
NPROC=${NPROC:-4}
BATCH=128
PER_DEVICE=1
source "$(dirname "$0")/common.sh"

train --learning_rate 1e-5 --num_train_epochs 5 --model_max_length 2048 --save_steps 2000 \
    "${COSINE[@]}" \
    "${FULL_SHARD[@]}" LlamaDecoderLayer \
    "$@"

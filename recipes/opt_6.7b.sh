#!/usr/bin/env bash
# Stanford Alpaca, OPT-6.7B: the second command of the 2023 README.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
MODEL=${MODEL:-facebook/opt-6.7b}
DATA=${DATA:-./alpaca_data.json}
OUTPUT=${OUTPUT:-output/alpaca-opt-6.7b}
NPROC=${NPROC:-4}
BATCH=128
PER_DEVICE=4
source "$(dirname "$0")/common.sh"

train --learning_rate 2e-5 --num_train_epochs 3 --model_max_length 512 --save_steps 2000 \
    "${COSINE[@]}" \
    "${FULL_SHARD[@]}" OPTDecoderLayer \
    "$@"

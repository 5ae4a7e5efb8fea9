#!/usr/bin/env bash
# Stanford Alpaca, LLaMA-7B, in full on one GPU of 80 GB: the recipe of llama_7b.sh with AdamW's state in 8 bits
# (arXiv 2110.02861, pip install bitsandbytes), 4 + 4 + 2 bytes a parameter, and recomputed activations. By the estimate,
# 73 GB with packs of 4096 tokens; not measured. Where it says no: --fsdp "full_shard auto_wrap offload", or LoRA.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
MODEL=${MODEL:-huggyllama/llama-7b}
DATA=${DATA:-./alpaca_data.json}
OUTPUT=${OUTPUT:-output/alpaca-7b}
NPROC=${NPROC:-1}
BATCH=128
PER_DEVICE=4
source "$(dirname "$0")/common.sh"

train --learning_rate 2e-5 --num_train_epochs 3 --model_max_length 512 --save_steps 400 \
    --optim adamw_bnb_8bit --gradient_checkpointing True \
    "${COSINE[@]}" \
    "$@"

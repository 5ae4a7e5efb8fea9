#!/usr/bin/env bash
# Alpaca with LoRA on one GPU of 24 GB, LLaMA-7B and its like. Published in 2023 (tloen/alpaca-lora): r=8, alpha=16,
# dropout 0.05 on q_proj and v_proj, batch 128, lr 3e-4, 3 epochs, cleaned Alpaca data. Ours: 512 tokens (there 256),
# loss on the answers only, the base in bf16 (8 bits), warmup and cosine. On 12 GB add --load_in_4bit True.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
NPROC=${NPROC:-1}
ACCUMULATION=$((128 / (4 * NPROC))) # batch 128 on any number of processes that divides it

torchrun --nproc_per_node="$NPROC" --master_port="${PORT:-29500}" train.py \
    --model_name_or_path "${MODEL:-huggyllama/llama-7b}" \
    --data_path "${DATA:-yahma/alpaca-cleaned}" \
    --lora_r 8 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --lora_target_modules q_proj,v_proj \
    --bf16 True \
    --output_dir "${OUTPUT:-output/alpaca-7b-lora}" \
    --num_train_epochs 3 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 200 \
    --save_total_limit 1 \
    --learning_rate 3e-4 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 True \
    "$@"

#!/usr/bin/env bash
# Stanford Alpaca, LLaMA-7B: 4 x A100 80 GB, batch 128, 3 epochs, lr 2e-5, 512 tokens.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
NPROC=${NPROC:-4}
ACCUMULATION=$((128 / (4 * NPROC))) # batch 128 on any number of processes that divides it

torchrun --nproc_per_node="$NPROC" --master_port="${PORT:-29500}" train.py \
    --model_name_or_path "${MODEL:-huggyllama/llama-7b}" \
    --data_path "${DATA:-./alpaca_data.json}" \
    --bf16 True \
    --output_dir "${OUTPUT:-output/alpaca-7b}" \
    --num_train_epochs 3 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 2000 \
    --save_total_limit 1 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --fsdp "full_shard auto_wrap" \
    --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' \
    --tf32 True \
    "$@"

#!/usr/bin/env bash
# M0, M1 and M2 of instruction backtranslation (arXiv 2308.06259), LLaMA-7B: batch 32 (8 below 3,000 rows:
# --gradient_accumulation_steps), lr 1e-5 falling in a line to 9e-6, weight decay 0.1, all as published. Not published,
# so ours: 3 epochs, no warmup, 2048 tokens. The paper's dropout of 0.1 is left out: LLaMA as published has none.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
NPROC=${NPROC:-4}
ACCUMULATION=$((32 / (2 * NPROC))) # batch 32 on any number of processes that divides it

torchrun --nproc_per_node="$NPROC" --master_port="${PORT:-29500}" train.py \
    --model_name_or_path "${MODEL:-huggyllama/llama-7b}" \
    --data_path "${DATA:-./seed.json}" \
    --bf16 True \
    --output_dir "${OUTPUT:-output/M0}" \
    --model_max_length 2048 \
    --num_train_epochs 3 \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 2000 \
    --save_total_limit 1 \
    --learning_rate 1e-5 \
    --weight_decay 0.1 \
    --lr_scheduler_type "polynomial" \
    --lr_scheduler_kwargs '{"lr_end": 9e-6, "power": 1.0}' \
    --logging_steps 1 \
    --fsdp "full_shard auto_wrap" \
    --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' \
    --tf32 True \
    "$@"

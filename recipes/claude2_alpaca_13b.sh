#!/usr/bin/env bash
# claude2-alpaca-13B: batch 128, 5 epochs, lr 1e-5, 2048 tokens, weight decay 0.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
NPROC=${NPROC:-4}
ACCUMULATION=$((128 / (1 * NPROC))) # batch 128 on any number of processes that divides it

torchrun --nproc_per_node="$NPROC" --master_port="${PORT:-29500}" train.py \
    --model_name_or_path "${MODEL:-meta-llama/Llama-2-13b-hf}" \
    --data_path "${DATA:-umd-zhou-lab/claude2_alpaca}" \
    --bf16 True \
    --output_dir "${OUTPUT:-output/claude2-alpaca-13b}" \
    --model_max_length 2048 \
    --num_train_epochs 5 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 2000 \
    --save_total_limit 1 \
    --learning_rate 1e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --fsdp "full_shard auto_wrap" \
    --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' \
    --tf32 True \
    "$@"

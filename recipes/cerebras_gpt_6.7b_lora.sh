#!/usr/bin/env bash
# GPT-6.7B-Alpaca: Cerebras-GPT-6.7B on an 8-bit base. Published (lucasmccabe-lmi/GPT-6.7B-CleanedAlpaca-1): LoRA r=4,
# alpha=16, dropout 0.05 on c_attn, pad token id 0 (which is "!"), batch 128, 3 epochs, lr 2e-5, 512 tokens, and the
# prompts of cerebras_prompt.json: two empty lines before the first heading, one after each, no "paired with an
# input". Whether white space follows "### Response:" it does not show; here none does. Ours: warmup, cosine, bf16.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
NPROC=${NPROC:-1}
ACCUMULATION=$((128 / (4 * NPROC))) # batch 128 on any number of processes that divides it

torchrun --nproc_per_node="$NPROC" --master_port="${PORT:-29500}" train.py \
    --model_name_or_path "${MODEL:-cerebras/Cerebras-GPT-6.7B}" \
    --data_path "${DATA:-yahma/alpaca-cleaned}" \
    --prompt_template recipes/cerebras_prompt.json \
    --load_in_8bit True \
    --lora_r 4 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --lora_target_modules c_attn \
    --pad_token '!' \
    --bf16 True \
    --output_dir "${OUTPUT:-output/cerebras-gpt-6.7b-alpaca-lora}" \
    --num_train_epochs 3 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 200 \
    --save_total_limit 1 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 True \
    "$@"

#!/usr/bin/env bash
# The backward model of instruction backtranslation (arXiv 2308.06259): Llama-2-7B learns which instruction an output
# answers, on the first pairs of OpenAssistant-Guanaco. Published (abhisheksagar/backward_model): LoRA r=8, alpha=32,
# dropout 0.05 on q, k, v, o; bf16. Not published, so ours: lr 2e-4, 3 epochs, batch 32, 2048 tokens (the instruction
# stands at the end of a row, where a smaller limit would cut it off), warmup, cosine, and the prompt.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
NPROC=${NPROC:-1}
ACCUMULATION=$((32 / (4 * NPROC))) # batch 32 on any number of processes that divides it

torchrun --nproc_per_node="$NPROC" --master_port="${PORT:-29500}" train.py \
    --model_name_or_path "${MODEL:-meta-llama/Llama-2-7b-hf}" \
    --data_path "${DATA:-timdettmers/openassistant-guanaco}" \
    --backward True \
    --lora_r 8 \
    --lora_alpha 32 \
    --lora_dropout 0.05 \
    --lora_target_modules q_proj,k_proj,v_proj,o_proj \
    --bf16 True \
    --output_dir "${OUTPUT:-output/backward-llama-2-7b-lora}" \
    --model_max_length 2048 \
    --num_train_epochs 3 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 200 \
    --save_total_limit 1 \
    --learning_rate 2e-4 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 True \
    "$@"

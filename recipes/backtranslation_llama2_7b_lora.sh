#!/usr/bin/env bash
# The backward model of instruction backtranslation (arXiv 2308.06259): Llama-2-7B learns which instruction an output
# answers, on the first pairs of OpenAssistant-Guanaco. Published (abhisheksagar/backward_model): LoRA r=8, alpha=32,
# dropout 0.05 on q, k, v, o; bf16. Not published, so ours: lr 2e-4, 3 epochs, batch 32, 2048 tokens (the instruction
# stands at the end of a row, where a smaller limit would cut it off), warmup, cosine, and the prompt.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
DATA=${DATA:-timdettmers/openassistant-guanaco}
OUTPUT=${OUTPUT:-output/backward-llama-2-7b-lora}
NPROC=${NPROC:-1}
BATCH=32
PER_DEVICE=4
source "$(dirname "$0")/common.sh"

train --backward True \
    --lora_r 8 --lora_alpha 32 --lora_dropout 0.05 --lora_target_modules q_proj,k_proj,v_proj,o_proj \
    --learning_rate 2e-4 --num_train_epochs 3 --model_max_length 2048 --save_steps 200 \
    "${COSINE[@]}" \
    "$@"

#!/usr/bin/env bash
# GPT-6.7B-Alpaca: Cerebras-GPT-6.7B on an 8-bit base. Published (lucasmccabe-lmi/GPT-6.7B-CleanedAlpaca-1): LoRA r=4,
# alpha=16, dropout 0.05 on c_attn, pad token id 0 (which is "!"), batch 128, 3 epochs, lr 2e-5, 512 tokens, and the
# prompts of cerebras_prompt.json: two empty lines before the first heading, one after each, no "paired with an
# input". Whether white space follows "### Response:" it does not show; here none does. Ours: warmup, cosine, bf16.
# MODEL, DATA, OUTPUT, NPROC and PORT replace the defaults; further flags go to train.py. Paths: from the repository.
MODEL=${MODEL:-cerebras/Cerebras-GPT-6.7B}
DATA=${DATA:-yahma/alpaca-cleaned}
OUTPUT=${OUTPUT:-output/cerebras-gpt-6.7b-alpaca-lora}
NPROC=${NPROC:-1}
BATCH=128
PER_DEVICE=4
source "$(dirname "$0")/common.sh"

train --load_in_8bit True --prompt_template recipes/cerebras_prompt.json --pad_token '!' \
    --lora_r 4 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules c_attn \
    --learning_rate 2e-5 --num_train_epochs 3 --model_max_length 512 --save_steps 200 \
    "${COSINE[@]}" \
    "$@"

#!/usr/bin/env bash
# Stanford Alpaca, LLaMA-7B on 2 nodes of 8 GPUs, flags as in llama_7b.sh (batch 128): run it on both nodes.
#
#     NODE_RANK=0 MASTER_ADDR=<first node> recipes/llama_7b_2x8.sh
#     NODE_RANK=1 MASTER_ADDR=<first node> recipes/llama_7b_2x8.sh
#
# MODEL, DATA and OUTPUT must name the same files on both: OUTPUT is one folder that they share. Parameters are sharded
# inside a node and replicated over the nodes, so that only gradients travel between them; FSDP="full_shard auto_wrap"
# shards over all 16 GPUs instead. NNODES, NPROC and PORT replace the other defaults; further flags go to train.py.
set -euo pipefail
cd "$(dirname "$0")/.."
NNODES=${NNODES:-2}
NPROC=${NPROC:-8}
ACCUMULATION=$((128 / (4 * NNODES * NPROC))) # batch 128 on any number of processes that divides it

torchrun --nnodes="$NNODES" --node_rank="${NODE_RANK:?0 on the first node, 1 on the second}" \
    --nproc_per_node="$NPROC" --master_addr="${MASTER_ADDR:?the address of the first node}" \
    --master_port="${PORT:-29500}" train.py \
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
    --save_steps 200 \
    --save_total_limit 1 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --fsdp "${FSDP:-hybrid_shard auto_wrap}" \
    --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' \
    --tf32 True \
    --resume_from_checkpoint True \
    "$@"

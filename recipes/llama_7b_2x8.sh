#!/usr/bin/env bash
# Stanford Alpaca, LLaMA-7B on 2 nodes of 8 GPUs, flags as in llama_7b.sh (batch 128): run it on both nodes.
#
#     NODE_RANK=0 MASTER_ADDR=<first node> recipes/llama_7b_2x8.sh
#     NODE_RANK=1 MASTER_ADDR=<first node> recipes/llama_7b_2x8.sh
#
# MODEL, DATA and OUTPUT must name the same files on both: OUTPUT is one folder that they share. Parameters are sharded
# inside a node and replicated over the nodes, so that only gradients travel between them; FSDP="full_shard auto_wrap"
# shards over all 16 GPUs instead. NNODES, NPROC and PORT replace the other defaults; further flags go to train.py.
MODEL=${MODEL:-huggyllama/llama-7b}
DATA=${DATA:-./alpaca_data.json}
OUTPUT=${OUTPUT:-output/alpaca-7b}
NNODES=${NNODES:-2}
NPROC=${NPROC:-8}
NODES="--nnodes=$NNODES --node_rank=${NODE_RANK:?0 on the first node, 1 on the second}"
NODES="$NODES --master_addr=${MASTER_ADDR:?the address of the first node}"
BATCH=128
PER_DEVICE=4
source "$(dirname "$0")/common.sh"

train --learning_rate 2e-5 --num_train_epochs 3 --model_max_length 512 --save_steps 200 \
    "${COSINE[@]}" \
    --fsdp "${FSDP:-hybrid_shard auto_wrap}" --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer \
    --resume_from_checkpoint True \
    "$@"

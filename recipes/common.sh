# What the recipes share. A recipe sets MODEL, DATA, OUTPUT, NPROC, BATCH (rows of an optimizer step) and PER_DEVICE (rows
# of a micro-batch), sources this file, and calls `train` with its published values and "$@", further flags for train.py.
# A flag that is given twice has its last value. Paths: from the repository.
set -euo pipefail
cd "$(dirname "$0")/.."

FULL_SHARD=(--fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap)
COSINE=(--weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine")

# torchrun's --shutdown-timeout, which older ones do not have: the seconds that a run which is told to stop has for its
# checkpoint. torchrun's own 30 are too few for 7B.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

# What torchrun would set, with a banner.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# NODES: torchrun's flags of several nodes. The batch is the same on any number of processes that divides it.
train() {
    # shellcheck disable=SC2086
    torchrun ${NODES:-} --nproc_per_node="$NPROC" --master_port="${PORT:-29500}" train.py \
        --model_name_or_path "$MODEL" \
        --data_path "$DATA" \
        --output_dir "$OUTPUT" \
        --bf16 True \
        --tf32 True \
        --per_device_train_batch_size "$PER_DEVICE" \
        --per_device_eval_batch_size 4 \
        --gradient_accumulation_steps "$((BATCH / (PER_DEVICE * NPROC * ${NNODES:-1})))" \
        --evaluation_strategy "no" \
        --save_strategy "steps" \
        --save_total_limit 1 \
        --logging_steps 1 \
        "$@"
}

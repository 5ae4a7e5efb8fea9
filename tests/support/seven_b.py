"""A 7B model and the flags of runs with it, for estimates of memory."""

from argparse import Namespace

import torch

from alpaca.training import memory

# ---- memory ----


def llama_7b():
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=32001, max_position_embeddings=2048)


SEVEN = memory.Model(
    parameters=7_000_000_000,
    trained=7_000_000_000,
    weight_bytes=28e9,
    largest_layer=200_000_000,
    layers=32,
    activations=6e6,
    layer_inputs=0.25e6,
    vocabulary=32_000,
)
ON_FOUR = memory.Plan(
    world_size=4,
    sharded=True,
    group=4,
    offload=False,
    checkpointing=None,
    half=True,
    optimizer_bytes=8,
    foreach=False,
    on_gpu=True,
    packed=True,
    rows=4,
    accumulation=8,
    tokens=0,
    share=0.5,
)


def flags_of(**changed):
    return Namespace(
        **{
            **dict(
                process_index=0,
                world_size=4,
                fsdp=True,
                fsdp_config={},
                parallelism_config=None,
                bf16=True,
                fp16=False,
                deepspeed=None,
                optim="adamw_torch_fused",
                gradient_checkpointing=None,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=8,
                device=torch.device("cuda"),
                batching="packed",
                max_tokens_per_pack="auto",
            ),
            **changed,
        }
    )

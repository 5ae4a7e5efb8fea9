"""LoRA adapters on tiny models."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

LLAMA = dict(target_modules=["q_proj", "k_proj", "down_proj"])


def make_adapter(base, folder, rows=0, seed=0, **settings) -> Path:
    """Make an adapter as after training: no tensor of it is what it was at the start. `rows`: added to the
    embeddings."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM", **settings}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return Path(folder)

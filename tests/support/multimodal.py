"""Tiny models with random weights that read images too, as folders on disk."""

import json
import shutil
from pathlib import Path

import torch
import transformers

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_hidden_layers=4,
)
SEEING = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=4)


def gemma3(text: dict) -> transformers.PreTrainedModel:
    """Opened whole, with its vision tower; on disk and in memory the names differ."""
    vision = dict(VISION, model_type="siglip_vision_model", image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen3_5(text: dict) -> transformers.PreTrainedModel:
    """AutoModelForCausalLM opens the language model alone."""
    vision = dict(SEEING, spatial_merge_size=1, num_position_embeddings=16)
    text = text | LINEAR | dict(tie_word_embeddings=False)
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return transformers.Qwen3_5ForConditionalGeneration(config)


MULTIMODAL = {"gemma3": gemma3, "qwen3_5": qwen3_5}


def make_multimodal(folder: Path, kind: str, tokenizer: str) -> Path:
    """Write the model `kind` into `folder`, with the tokenizer of another."""
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = json.loads((Path(tokenizer) / "config.json").read_text())
    text = SIZES | {"vocab_size": config["vocab_size"], "max_position_embeddings": 512}
    text |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    MULTIMODAL[kind](text).save_pretrained(folder)
    return folder

"""Flags of train.py as its functions get them."""

from train import ModelArguments, TrainingArguments


def arguments(tmp_path, model, **model_flags):
    training = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    return ModelArguments(model_name_or_path=str(model), **model_flags), training

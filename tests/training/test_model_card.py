"""The model card: what it says of a run, that its Python works, whose README.md it replaces. The card of a real run is
in test_train.py."""

import hashlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_card, write_rows
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerState

from alpaca.data.chat_template import set_chat_template
from alpaca.data.prompts import PROMPT_DICT, format_prompt, templates_of
from alpaca.data.tokenizer import open_tokenizer
from alpaca.training.model_card import MARKER, base_source, commit, data_source, model_card, write_model_card
from alpaca.training.model_card import ROOT as CODE
from alpaca.training.trainer import AlpacaTrainer
from scripts.make_tiny_model import make_tiny_model
from train import SupervisedDataset, parse_flags

pytestmark = pytest.mark.slow

LOG = [
    {"step": 2, "loss": 4.0, "tokens_per_second": 100.0, "peak_memory_gb": 1.5},
    {"step": 3, "loss": 1.0, "tokens_per_second": 300.0, "peak_memory_gb": 2.25},
    {"step": 3, "eval_loss": 1.25},
    {"step": 4, "loss": 3.0, "tokens_per_second": 200.0, "peak_memory_gb": 2.0},
    {"step": 4, "train_runtime": 61.2, "train_loss": 2.0},
]


@pytest.fixture
def finished(tiny, tmp_path):
    """finished(model, templates, **flags) -> (a stand-in for the trainer of a finished run, its other flags)."""

    def make(model=None, templates=PROMPT_DICT, **flags):
        data = {"data_path": write_rows(tmp_path / "rows.json", 5), "model_name_or_path": tiny("llama")} | flags
        words = [f"--{name}={value}" for name, value in {**data, "output_dir": tmp_path / "my_model"}.items()]
        *others, args = parse_flags([*words, "--use_cpu", "--max_steps=4"])
        tokenizer = open_tokenizer(tiny("llama"), model_max_length=512)
        set_chat_template(tokenizer, templates, rank=0)
        dataset = SupervisedDataset(str(tmp_path / "rows.json"), tokenizer, templates)
        state = TrainerState(global_step=4, max_steps=4, epoch=6.4, log_history=LOG)
        model = model or torch.nn.Module()
        if not hasattr(model, "config"):
            model.config = SimpleNamespace()
        trainer = SimpleNamespace(
            args=args, state=state, model=model, train_dataset=dataset, started_at=0, processing_class=tokenizer
        )
        return trainer, {name: value for group in others for name, value in vars(group).items()}

    return make


def code_of(card: str) -> str:
    return re.search("```python\n(.*?)```", card, re.DOTALL)[1]


def row_of(card: str, name: str) -> str:
    return re.search(rf"^\| {re.escape(name)} \| (.*) \|$", card, re.MULTILINE)[1]


def test_the_run_as_it_was(finished):
    trainer, flags = finished(
        learning_rate="3e-4",
        bf16=True,
        warmup_ratio=0.5,
        lr_scheduler_type="cosine",
        gradient_accumulation_steps=2,
        seed=5,
    )
    card = model_card(trainer, flags)
    told = {
        name: row_of(card, name) for name in ("Learning rate", "Schedule", "Epochs", "Arithmetic", "Seed", "Batches")
    }
    assert told == {
        "Learning rate": "0.0003",
        "Schedule": "cosine, warmup steps: 2",
        "Epochs": "6.4",
        "Seed": "5",
        "Arithmetic": "bfloat16",
        "Batches": "packed, attention confined to each row",
    }
    assert row_of(card, "Global batch") == "16 rows: 8 per device x 2 accumulated x 1 process"
    assert (
        row_of(card, "First loss logged") == "4.0000 (step 2)" and row_of(card, "Last loss logged") == "3.0000 (step 4)"
    )
    assert row_of(card, "Mean training loss") == f"{(2 * 4 + 1 + 3) / 4:.4f}", "an entry stands for its steps"
    assert row_of(card, "Evaluation loss") == "1.2500 (step 3)" and row_of(card, "Time") == "0:01:01"
    assert row_of(card, "Tokens per second").startswith("200 ")
    assert row_of(card, "Peak memory of the first process") == "2.25 GB"
    assert row_of(card, "torch") == torch.__version__ and not re.search(r"^\| (peft|LoRA|Sharding)", card, re.MULTILINE)
    assert "None" not in card and "![Loss over the optimizer steps](loss.png)" in card
    trainer.started_at, trainer.state.log_history[0]["padding_share"] = 2, 0.1
    card = model_card(trainer, flags)
    assert row_of(card, "Time") == "0:01:01, of the steps since 2, where it was resumed"
    assert row_of(card, "Batches") == "padded", "what was done, not what was asked for"


def test_names_fingerprints_and_licences_but_no_path(finished, tmp_path, tiny):
    trainer, flags = finished()
    content = model_card(trainer, flags)
    card, dataset = ModelCard(content), trainer.train_dataset
    assert (card.data.base_model, card.data.datasets, card.data.license) == (None, None, None)
    assert hashlib.sha256((tmp_path / "rows.json").read_bytes()).hexdigest() in content
    assert dataset.data_fingerprint in content and f"5 rows, {dataset.lengths.sum():,} tokens" in content
    assert f"`{Path(tiny('llama')).name}` (a local folder)" in content and "# my_model\n" in content
    assert "base model: not stated; data: not stated" in content
    for path in (tmp_path, Path(tiny("llama")).parent, Path.home(), ROOT):
        assert str(path) not in content
    of_hub = ModelCard(
        model_card(trainer, {**flags, "model_name_or_path": "huggyllama/llama-7b", "data_path": "tatsu-lab/alpaca"})
    )
    assert (of_hub.data.base_model, of_hub.data.datasets) == ("huggyllama/llama-7b", ["tatsu-lab/alpaca"])
    assert "data: CC BY-NC 4.0" in of_hub.text and "Split: `train`" in of_hub.text

    assert (
        data_source(str(shutil.copy(ROOT / "seed_tasks.jsonl", tmp_path / "a.jsonl")), "train").licence == "Apache-2.0"
    )
    assert data_source("yahma/alpaca-cleaned", "train").licence is None
    cached = tmp_path / "models--facebook--opt-6.7b" / "snapshots" / "abc123"
    cached.mkdir(parents=True)
    (cached / "README.md").write_text("---\nlanguage: en\nlicense: 'opt-175b'\n---\n# license: mit\n")
    base = base_source(str(cached))
    assert (base.hub_id, base.licence) == ("facebook/opt-6.7b", "opt-175b") and "abc123" in base.shown


def test_the_commit_is_that_of_the_code():
    assert (commit() or "").startswith("commit ") == (CODE / ".git").exists()


@pytest.mark.parametrize("fence", ["Q: ", "```\n````\n"])
def test_own_prompts_are_shown_verbatim(finished, fence):
    templates = {
        "prompt_input": fence + "{instruction} {input} A:",
        "prompt_no_input": fence + "{{x}} {instruction} A:",
    }
    card = model_card(*finished(templates=templates))
    marks = "`" * (5 if "`" in fence else 3)
    for text in templates.values():
        assert f"\n\n{marks}text\n{text}\n{marks}\n\n" in card
    assert "An input goes into the\nmessage under a key of its own" in card, "a space is nothing to split at"


def test_asking_without_a_chat_template(finished, tiny, tmp_path, monkeypatch):
    trainer, flags = finished()
    trainer.processing_class.chat_template = None
    monkeypatch.chdir(tiny("llama"))
    exec(code_of(model_card(trainer, flags)), names := {})
    prompt = format_prompt({"instruction": "Give three tips for staying healthy."})
    assert names["inputs"]["input_ids"].tolist() == [trainer.processing_class(prompt)["input_ids"]] and names["answer"]


@pytest.mark.parametrize("bits", [None, 4])
def test_an_adapter_is_loaded_onto_its_base(finished, tmp_path, bits):
    """With a new token, and with 8 bits: test_lora.py. bitsandbytes' blocks of 4 bits have 64 weights."""
    wide = str(make_tiny_model(tmp_path / "base", hidden_size=64, num_hidden_layers=1))
    options = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    quantization = {"quantization_config": BitsAndBytesConfig(**options)} if bits else {}
    base = AutoModelForCausalLM.from_pretrained(wide, **quantization)
    torch.manual_seed(0)
    model = get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=16,
            lora_dropout=0.05,
            target_modules=["v_proj", "q_proj"],
            init_lora_weights=False,
        ),
    )
    trainer, flags = finished(model, model_name_or_path=wide)
    out = Path(trainer.args.output_dir)
    model.save_pretrained(out)
    trainer.processing_class.save_pretrained(out)
    write_model_card(trainer, flags)  # over peft's
    card = ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.tags) == ("peft", ["alpaca", "lora"]) and MARKER in card.text
    assert row_of(card.text, "LoRA") == "r 4, alpha 16, dropout 0.05"
    assert row_of(card.text, "LoRA target modules") == "q_proj, v_proj"
    assert ("| Quantized base | 4 bits |" in card.text) == bool(quantization) and "| peft |" in card.text

    names = run_card(out)
    loaded = names["model"]
    assert isinstance(loaded, PeftModel) and names["answer"]
    config = getattr(loaded.config, "quantization_config", None)
    assert (config and config.to_diff_dict()) == (base.config.quantization_config.to_diff_dict() if config else None)
    assert bool(config) == bool(quantization)
    ids = names["inputs"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**ids).logits, model.eval()(**ids).logits)

    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    card = model_card(trainer, {**flags, "model_name_or_path": "meta-llama/Llama-2-7b-hf"})
    assert '\nbase = "meta-llama/Llama-2-7b-hf"\n' in code_of(card) and "PeftConfig" not in card
    assert "= BitsAndBytesConfig(load_in_8bit=True)\n" in card and "| Quantized base | 8 bits |" in card


def test_saving_an_adapter_leaves_a_readme_of_the_users_own_alone(finished, tiny):
    """peft would rewrite it."""
    stand_in, flags = finished()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny("llama")), LoraConfig(task_type="CAUSAL_LM"))
    trainer = AlpacaTrainer(
        model=model,
        args=stand_in.args,
        train_dataset=stand_in.train_dataset,
        flags=flags,
        processing_class=stand_in.processing_class,
        data_collator=list,
    )
    out = Path(stand_in.args.output_dir)
    out.mkdir(exist_ok=True)
    (out / "README.md").write_text("# Mine\n")
    trainer.state = stand_in.state
    for _ in range(2):
        trainer.save_model()
        trainer.create_model_card()
    assert (out / "README.md").read_text() == "# Mine\n" and (out / "adapter_config.json").is_file()
    assert (out / "loss.png").is_file() and templates_of(out) == PROMPT_DICT
    (out / "README.md").unlink()
    trainer.save_model()
    assert not (out / "README.md").exists()
    trainer.create_model_card(model_name="as the Trainer calls it to upload a model")
    assert ModelCard.load(out / "README.md").data.library_name == "peft"


def test_a_readme_of_the_users_own_stays(finished, capsys):
    trainer, flags = finished()
    path = Path(trainer.args.output_dir) / "README.md"
    for written, ours in (
        ("# What I did\n", False),
        (f"---\nlicense: mit\n---\n{MARKER}\n", True),
        (
            "<!-- This model card has been generated automatically according to the information the Trainer had access "
            "to-->\n",
            True,
        ),
        ("---\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n\n<!-- Provide a quick summary -->\n", True),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(written)
        write_model_card(trainer, flags)
        assert (path.read_text() == written) != ours and ours == (MARKER in path.read_text())
        assert ("stays as it is: no model card is written" in capsys.readouterr().out) != ours

"""train.py from the command line: the README's commands, saving, resuming, evaluating, logging."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED, history, largest_difference, recipe, run, run_card, train, weights, write_rows
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from alpaca.data.prompts import PROMPT_DICT, TEMPLATE_FILE, format_prompt, templates_of
from scripts.quickstart import README_FLAGS, fresh_folder
from train import TrainingArguments, safe_save_model_for_hf_trainer

pytestmark = pytest.mark.slow

SMALL = dict(per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, save_strategy="no")


def readme_command(**changed):
    flags = {name.removeprefix("--"): value for name, value in README_FLAGS.items() if name != "--nproc_per_node"}
    return {**flags, **changed}


@pytest.mark.parametrize(
    "architecture, layer, fsdp",
    [
        ("llama", "LlamaDecoderLayer", "full_shard auto_wrap"),
        pytest.param("llama", "LLaMADecoderLayer", "full_shard auto_wrap offload", marks=pytest.mark.stress),
        pytest.param("opt", "OPTDecoderLayer", "full_shard auto_wrap", marks=pytest.mark.stress),
    ],
)
def test_readme_command(tiny, tmp_path, architecture, layer, fsdp):
    out = tmp_path / "out"
    flags = readme_command(
        model_name_or_path=tiny(architecture),
        data_path=str(ROOT / "seed_tasks.jsonl"),
        output_dir=out,
        fsdp_transformer_layer_cls_to_wrap=layer,
        fsdp=fsdp,
        num_train_epochs=1,
    )
    result = train(flags, processes=2, real=architecture == "opt")
    assert [entry["step"] for entry in history(out)] == [1, 2, 3]
    assert result.stdout.count("--evaluation_strategy no -> --eval_strategy no") == 1, "noted once, by rank 0"
    assert "--save_steps 2000 exceeds the 3 steps" in result.stdout
    assert not list(out.glob("checkpoint-*"))
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32 and model.config.use_cache
    assert type(model).__name__ == {"llama": "LlamaForCausalLM", "opt": "OPTForCausalLM"}[architecture]
    assert model.config.architectures == [type(model).__name__]
    rows = {
        len(tokenizer),
        model.config.vocab_size,
        *(t.shape[0] for n, t in weights(out).items() if "embed_tokens" in n),
    }
    assert len(rows) == 1, "vocabulary of tokenizer, config and weights"
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    assert tokenizer("x")["input_ids"] == AutoTokenizer.from_pretrained(tiny(architecture))("x")["input_ids"]
    check_model_card(out, tokenizer)


def check_model_card(out, tokenizer):
    """The card's own Python loads the model and asks it with the prompt that it was trained with."""
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == dict(library_name="transformers", pipeline_tag="text-generation", tags=["alpaca"])
    assert "| Global batch | 64 rows: 4 per device x 8 accumulated x 2 processes |" in card.text
    assert "| Sharding | FSDP2" in card.text and "| Schedule | cosine, warmup steps: 1 |" in card.text
    assert str(Path.home()) not in card.content and str(out.parent) not in card.content
    names = run_card(out)
    prompt = tokenizer(format_prompt({"instruction": "Give three tips for staying healthy."}, templates_of(out)))
    assert names["inputs"]["input_ids"].tolist() == [prompt["input_ids"]] and names["answer"]


@pytest.mark.stress
def test_plain_line_per_step(tiny, tmp_path):
    result = train(
        dict(
            model_name_or_path=tiny("llama"),
            data_path=write_rows(tmp_path / "r.json", 6),
            output_dir=tmp_path / "out",
            num_train_epochs=1,
            **SMALL,
        ),
        real=True,
    )
    line = next(line for line in result.stdout.splitlines() if line.startswith("step 2/3"))
    for part in ("epoch 0.67", "loss ", "lr ", "grad norm ", "tokens/s", "ETA 0:00:0"):
        assert part in line
    assert "it/s" not in result.stderr, "no progress bars in a log file"


@pytest.mark.skipif(not SHARED.exists(), reason="the real Alpaca rows are not here")
@pytest.mark.stress
def test_an_epoch_of_real_alpaca_rows(tiny, tmp_path):
    train(
        dict(
            model_name_or_path=tiny("llama"),
            data_path=SHARED / "alpaca_data_1k.json",
            output_dir=tmp_path / "out",
            num_train_epochs=1,
            **{**SMALL, "per_device_train_batch_size": 8},
        )
    )
    losses = [entry["loss"] for entry in history(tmp_path / "out")]
    assert len(losses) == math.ceil(1000 / 8) and sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_resuming_under_ddp_ends_with_the_same_weights(tiny, tmp_path, processes=2, fsdp=""):
    """From the middle of the second epoch, bit for bit, dropout included (OPT), through a copied output folder. One
    process and sharded ranks: test_resume.py."""
    data = write_rows(tmp_path / "rows.json", 22)
    flags = dict(model_name_or_path=tiny("opt"), data_path=data, fsdp=fsdp, **SMALL, num_train_epochs=3)
    flags |= dict(save_strategy="steps", save_steps=4, save_total_limit=2, gradient_accumulation_steps=2)
    train(dict(output_dir=tmp_path / "whole", **flags), processes)
    steps = len(history(tmp_path / "whole"))
    kept = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert kept == [steps // 4 * 4 - 4, steps // 4 * 4], "save_total_limit"
    first = tmp_path / "whole" / f"checkpoint-{kept[0]}"
    AutoModelForCausalLM.from_pretrained(first)  # a checkpoint is a model
    shutil.copytree(first, tmp_path / "again" / first.name)
    train(dict(output_dir=tmp_path / "again", resume_from_checkpoint="True", **flags), processes)
    assert largest_difference(tmp_path / "again", tmp_path / "whole") == 0
    assert [e["loss"] for e in history(tmp_path / "again")] == [e["loss"] for e in history(tmp_path / "whole")]


def test_resuming_from_a_named_checkpoint_into_another_folder(tiny, tmp_path):
    data = write_rows(tmp_path / "rows.json", 8)
    flags = dict(
        model_name_or_path=tiny("llama"), data_path=data, **{**SMALL, "save_strategy": "epoch"}, num_train_epochs=2
    )
    train(dict(output_dir=tmp_path / "a", **flags))
    train(dict(output_dir=tmp_path / "b", resume_from_checkpoint=tmp_path / "a" / "checkpoint-4", **flags))
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0


@pytest.mark.parametrize("processes, fsdp", [(0, ""), (2, "full_shard auto_wrap")])
def test_save_dtype_is_for_the_final_model_only(tiny, tmp_path, processes, fsdp):
    out = tmp_path / "out"
    train(
        dict(
            model_name_or_path=tiny("llama"),
            data_path=write_rows(tmp_path / "r.json", 8),
            output_dir=out,
            fsdp=fsdp,
            save_dtype="bfloat16",
            max_steps=2,
            **{**SMALL, "save_strategy": "steps"},
            save_steps=2,
        ),
        processes,
    )
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(out / "checkpoint-2").values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert all((folder / TEMPLATE_FILE).is_file() for folder in (out, out / "checkpoint-2"))
    assert AutoTokenizer.from_pretrained(out / "checkpoint-2").chat_template
    for name, tensor in weights(out / "checkpoint-2").items():
        assert torch.equal(tensor.bfloat16(), weights(out)[name])


@pytest.mark.parametrize("processes, fsdp", [(0, ""), (2, "full_shard auto_wrap")])
def test_evaluation_loss_is_the_mean_over_target_tokens(tiny, tmp_path, processes, fsdp):
    """Without the dropout and the label smoothing of training."""
    data, out = write_rows(tmp_path / "rows.json", 7), tmp_path / "out"
    train(
        dict(
            model_name_or_path=tiny("opt"),
            data_path=data,
            eval_data_path=data,
            output_dir=out,
            fsdp=fsdp,
            evaluation_strategy="steps",
            eval_steps=1,
            max_steps=1,
            label_smoothing_factor=0.1,
            per_device_eval_batch_size=2,
            **SMALL,
        ),
        processes,
    )
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    logged = next(entry["eval_loss"] for entry in entries if "eval_loss" in entry)

    from train import SupervisedDataset

    tokenizer = AutoTokenizer.from_pretrained(out, model_max_length=512)
    model, dataset = AutoModelForCausalLM.from_pretrained(out), SupervisedDataset(data, tokenizer)
    total, targets = 0.0, 0
    for row in dataset:
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, row["labels"][1:], reduction="sum").item()
        targets += int((row["labels"][1:] != -100).sum())
    assert logged == pytest.approx(total / targets, rel=1e-5)


@pytest.mark.stress
def test_tensorboard_and_wandb_offline(tiny, tmp_path):
    train(
        dict(
            model_name_or_path=tiny("llama"),
            data_path=write_rows(tmp_path / "r.json", 4),
            num_train_epochs=1,
            output_dir=tmp_path / "out",
            **SMALL,
        )
        | {"report_to": "tensorboard"},
        env={"TENSORBOARD_LOGGING_DIR": str(tmp_path / "tb")},
    )
    assert any(path.stat().st_size > 500 for path in (tmp_path / "tb").rglob("events.out.tfevents.*"))
    train(
        dict(
            model_name_or_path=tiny("llama"),
            data_path=tmp_path / "r.json",
            num_train_epochs=1,
            output_dir=tmp_path / "out2",
            **SMALL,
        )
        | {"report_to": "wandb"},
        env={"WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline"},
    )
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.stress
def test_bf16_on_a_cpu_is_close_to_float32(tiny, tmp_path):
    for name, bf16 in (("bf16", True), ("fp32", False)):
        train(
            dict(
                model_name_or_path=tiny("llama"),
                data_path=write_rows(tmp_path / "r.json", 8),
                bf16=bf16,
                output_dir=tmp_path / name,
                num_train_epochs=1,
                **SMALL,
            )
        )
    a, b = ([entry["loss"] for entry in history(tmp_path / name)] for name in ("bf16", "fp32"))
    assert a != b and a == pytest.approx(b, abs=0.02)
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}


def test_own_prompt_template(tiny, tmp_path):
    template = {"prompt_input": "Q {instruction} {input} A ", "prompt_no_input": "Q {instruction} A "}
    (tmp_path / "t.json").write_text(json.dumps(template))
    data = write_rows(tmp_path / "r.json", 4)
    short, usual = (
        train(
            dict(
                model_name_or_path=tiny("llama"),
                data_path=data,
                output_dir=tmp_path / name,
                max_steps=1,
                **SMALL,
                **flags,
            )
        ).stdout
        for name, flags in (("a", {"prompt_template": tmp_path / "t.json"}), ("b", {}))
    )

    def tokens(output):
        return int(output.split(" rows, ")[1].split(" tokens")[0])

    assert tokens(short) < tokens(usual) / 2
    assert templates_of(tmp_path / "a") == template and templates_of(tmp_path / "b") == PROMPT_DICT
    asked = [{"role": "user", "content": "x"}]
    assert AutoTokenizer.from_pretrained(tmp_path / "a").apply_chat_template(asked, tokenize=False) == "<s> Q x A "


RECIPES = {
    "llama_7b": ("llama", "2e-05", 3, 512),
    "llama_13b": ("llama", "1e-05", 5, 512),
    "opt_6.7b": ("opt", "2e-05", 3, 512),
    "llama2_7b_alpaca_cleaned": ("llama", "2e-05", 3, 512),
    "claude2_alpaca_7b": ("llama", "1e-05", 5, 2048),
    "claude2_alpaca_13b": ("llama", "1e-05", 5, 2048),
    "humpback_llama_7b": ("llama", "1e-05", 3, 2048),
}


LORA_RECIPES = {  # architecture, learning rate, length, batch; r, alpha, where
    "backtranslation_llama2_7b_lora": ("llama", 2e-4, 2048, 32, 8, 32, ["k_proj", "o_proj", "q_proj", "v_proj"]),
    "cerebras_gpt_6.7b_lora": ("gpt2", 2e-5, 512, 128, 4, 16, ["c_attn"]),
    "one_24gb_gpu": ("llama", 3e-4, 512, 128, 8, 16, ["q_proj", "v_proj"]),
}


def test_every_recipe_is_tested():
    names = {path.stem for path in (ROOT / "recipes").glob("*.sh")} - {"common"}
    assert names == {*RECIPES, *LORA_RECIPES, "llama_7b_one_80gb", "llama_7b_2x8"}  # test_multinode.py


IN_SHORT = ("llama_7b", "humpback_llama_7b", "one_24gb_gpu")  # in make test: one of each kind


def named(recipes):
    return [pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.stress) for name in recipes]


@pytest.mark.parametrize("name", named(RECIPES))
def test_recipe_in_miniature(tiny, tmp_path, name, monkeypatch):
    """Its own flags, a tiny model, one step of its batch; the published values are read back from the run. The first of
    each architecture on 2 sharded ranks, the others, to be quick, on one; one of them by torchrun."""
    from conftest import free_port

    architecture, learning_rate, epochs, length = RECIPES[name]
    env = dict(
        MODEL=tiny(architecture),
        DATA=write_rows(tmp_path / "r.json", 130),
        OUTPUT=str(tmp_path / "out"),
        NPROC="2" if name in ("llama_7b", "opt_6.7b") else "1",
        PORT=str(free_port()),
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    result = recipe(f"{name}.sh", ["--max_steps", "1"], env, real=name == "llama_7b")
    batch, decay, warmup, schedule = (32, 0.1, 0, "polynomial") if "humpback" in name else (128, 0, 3, "cosine")
    assert f"{batch} a step" in result.stdout
    assert 'flag: --fsdp "full_shard auto_wrap" --fsdp_transformer' in result.stdout
    monkeypatch.setattr(sys.modules["__main__"], "TrainingArguments", TrainingArguments, raising=False)
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (args.learning_rate, args.num_train_epochs, args.model_max_length) == (float(learning_rate), epochs, length)
    assert (args.weight_decay, args.get_warmup_steps(100), args.lr_scheduler_type.value) == (decay, warmup, schedule)
    if schedule == "polynomial":
        (step,) = history(tmp_path / "out")
        assert step["learning_rate"] == pytest.approx(1e-5) and args.lr_scheduler_kwargs["lr_end"] == 9e-6
    assert args.bf16 and bool(args.fsdp) == (env["NPROC"] == "2")


@pytest.mark.parametrize("name", named(LORA_RECIPES))
def test_lora_recipe_in_miniature(tiny, tmp_path, name, monkeypatch):
    from conftest import free_port

    architecture, learning_rate, length, batch, r, alpha, layers = LORA_RECIPES[name]
    env = dict(
        MODEL=tiny(architecture),
        DATA=write_rows(tmp_path / "r.json", batch + 2),
        OUTPUT=str(tmp_path / "out"),
        PORT=str(free_port()),
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    if "backtranslation" in name:
        chats = [{"text": f"### Human: Say {i}.### Assistant: {i}### Human: Why?"} for i in range(batch + 2)]
        (tmp_path / "r.json").write_text(json.dumps(chats))
    result = run(["bash", ROOT / "recipes" / f"{name}.sh", "--max_steps", "1"], env=env)
    assert f"{batch} a step" in result.stdout and ("ends_on_human" in result.stdout) == ("backtranslation" in name)
    monkeypatch.setattr(sys.modules["__main__"], "TrainingArguments", TrainingArguments, raising=False)
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (args.learning_rate, args.num_train_epochs, args.model_max_length) == (learning_rate, 3, length)
    assert args.bf16 and not args.fsdp
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (r, alpha, 0.05)
    assert sorted(adapter["target_modules"]) == layers


@pytest.mark.stress
def test_7b_on_one_gpu_of_80_gb_in_miniature(tiny, tmp_path):
    """AdamW of 8 bits, killed after a checkpoint and continued: the same bits as the run that went through. The packing
    check and the estimate are those of any run."""
    from conftest import free_port

    pytest.importorskip("bitsandbytes")
    env = dict(
        MODEL=tiny("llama"),
        DATA=write_rows(tmp_path / "r.json", 300),
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )

    flags = "--max_steps 4 --save_steps 2 --save_total_limit 2".split()

    def start(name, *more):
        named = dict(OUTPUT=str(tmp_path / name), PORT=str(free_port()))
        return run(["bash", ROOT / "recipes" / "llama_7b_one_80gb.sh", *flags, *more], env=env | named).stdout

    told = start("whole")
    assert "128 a step" in told and "checked: a packed step has the gradient of a padded one" in told
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    told = start("cut", "--resume_from_checkpoint", "True")
    assert "step 3/4" in told and "step 2/4" not in told
    whole, cut = (weights(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    whole, bits8 = (tmp_path / "cut" / "checkpoint-4" / name for name in ("model.safetensors", "optimizer.pt"))
    assert 0.3 < bits8.stat().st_size / whole.stat().st_size < 2, "of the embeddings 8 bytes a parameter, else 2"


def test_the_saving_function_of_2023_that_forks_import(tiny, tmp_path):
    """It takes any Trainer, ours or transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True))
    safe_save_model_for_hf_trainer(trainer=trainer, output_dir=str(tmp_path / "out"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.stress  # `make test` has its story in test_weight_diff.py: train, publish, recover, ask
@pytest.mark.parametrize("processes", [1, 2])
def test_quickstart_in_the_folder_of_an_earlier_one(tmp_path, processes):
    """The whole story; a folder that quickstart did not make is left alone."""
    folder = tmp_path / "q"
    (folder / "tuned").mkdir(parents=True)
    (folder / "tuned" / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit, match="was not made by quickstart"):
        fresh_folder(folder)
    assert (folder / "tuned" / "mine.txt").exists()
    (folder / ".made-by-quickstart").touch()
    result = run(
        [sys.executable, "-m", "scripts.quickstart", "--folder", folder, "--nproc_per_node", processes], timeout=600
    )
    assert "of 5 answers are word for word" in result.stdout and "2e-5 -> 1e-3" in result.stdout
    assert not (folder / "tuned" / "mine.txt").exists()
    assert result.stdout.count("\nproved: ") == 2 and (folder / "recovered" / "model.safetensors").exists()
    offered = f"scripts.generate --model {folder / 'tuned'} --interactive", f"scripts.demo --model {folder / 'tuned'}"
    assert all(f"    python -m {command}" in result.stdout for command in offered)

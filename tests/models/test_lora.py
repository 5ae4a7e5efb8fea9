"""LoRA: equal on any number of processes and after a resume, on quantized bases, with and without new tokens."""

import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import history, run_card, train, write_rows
from safetensors.torch import load_file
from support.seven_b import flags_of, llama_7b
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alpaca.common.errors import UsageError
from alpaca.models.lora import LoraArguments, add_lora
from alpaca.training import memory, preflight
from alpaca.training.metrics import Cost
from scripts.make_tiny_model import make_tiny_model

STRESS = pytest.mark.stress


def train_here(tmp_path, **flags):
    """train.py in this process."""
    from train import train as train_in_process

    torch.manual_seed(0)
    train_in_process([f"--{name}={value}" for name, value in flags_for(tmp_path, **flags).items()])
    return adapter(tmp_path / flags["output_dir"])


def flags_for(tmp_path, **flags):
    data = write_rows(tmp_path / "rows.json", 36)
    common = dict(
        data_path=data,
        lora_r=4,
        learning_rate=1e-2,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        cache_dir=tmp_path,
        use_cpu=True,
    )
    return {**common, **flags, "output_dir": tmp_path / flags["output_dir"]}


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def apart(found, expected):
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


@pytest.mark.slow
def test_sharded_packed_and_resumed_equals_alone_and_padded(tiny, tmp_path):
    """36 rows, 8 a step: in five steps, the last of 4 rows. The sharded run saves after the third."""
    base = dict(model_name_or_path=tiny("llama"))
    alone = train_here(tmp_path, output_dir="alone", batching="padded", **base)
    sharded = dict(
        base,
        output_dir="sharded",
        fsdp="full_shard auto_wrap",
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=3,
    )
    log = train(flags_for(tmp_path, **sharded), processes=2).stdout
    assert "packs that share what rows begin with" in log
    folder = tmp_path / "sharded"
    assert apart(adapter(folder), alone) < 1e-5
    checkpoint = adapter(folder / "checkpoint-3")
    assert apart(checkpoint, alone) > 1e-3 and all(weight.dtype == torch.float32 for weight in checkpoint.values())
    assert not list(folder.glob("model*")) and not list((folder / "checkpoint-3").glob("model*")), (
        "the base is not saved"
    )

    (folder / "adapter_model.safetensors").unlink()
    sharded.pop("fsdp")
    resumed = train_here(tmp_path, **{**sharded, "per_device_train_batch_size": 8, "resume_from_checkpoint": True})
    assert apart(resumed, alone) < 1e-5
    assert [entry["step"] for entry in history(folder)] == [1, 2, 3, 4, 5] and apart(resumed, checkpoint) > 1e-3

    with pytest.raises(UsageError, match="--lora_alpha: 16 then, 32 now"):
        (folder / "adapter_model.safetensors").unlink()
        train_here(tmp_path, **{**sharded, "resume_from_checkpoint": True, "lora_alpha": 32})


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, flags",
    [
        pytest.param("gpt2", dict(load_in_8bit=True, lora_target_modules="c_attn", pad_token="!"), marks=STRESS),
        ("llama", dict(load_in_4bit=True)),
        pytest.param("gpt2", dict(load_in_4bit=True, bf16=True, lora_dropout=0.05), marks=STRESS),
    ],
)
def test_a_quantized_base_is_trained_and_loads(tmp_path, architecture, flags):
    """As the README says how. bitsandbytes quantizes blocks of 64 weights."""
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    name = make_tiny_model(tmp_path / "base", architecture, hidden_size=64)
    saved = train_here(tmp_path, output_dir="out", model_name_or_path=name, **flags)
    kind = (
        dict(load_in_8bit=True)
        if "load_in_8bit" in flags
        else dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    )
    base = AutoModelForCausalLM.from_pretrained(name, quantization_config=BitsAndBytesConfig(**kind), device_map="cpu")
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    quantized = {type(module).__name__ for module in base.modules()} & {"Linear8bitLt", "Linear4bit"}
    assert len(quantized) == 1
    loaded = {name.replace(".default", ""): weight for name, weight in model.named_parameters() if "lora_" in name}
    assert apart({name: weight.float() for name, weight in loaded.items()}, saved) == 0
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in saved.items())
    losses = [entry["loss"] for entry in history(tmp_path / "out")]
    assert losses[-1] < losses[0]
    if "pad_token" in flags:
        asked = run_card(tmp_path / "out")
        assert asked["quantization"].load_in_8bit and isinstance(asked["model"], PeftModel) and asked["answer"]
        saved_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        ids = saved_tokenizer("Look!!").input_ids
        assert saved_tokenizer.decode(ids, skip_special_tokens=True) == "Look!!", "! is a word, not a control token"
        assert saved_tokenizer.pad_token_id is not None and len(saved_tokenizer) == base.config.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2's embeddings are tied
def test_added_rows_are_trained_and_saved(tiny, tmp_path, architecture):
    """And loaded as the model card says how."""
    name = tiny(architecture)
    saved = train_here(tmp_path, output_dir="out", model_name_or_path=name, add_missing_tokens=True, bf16=True)
    rows = {name: row for name, row in saved.items() if "trainable_tokens" in name}
    assert len(rows) == (2 if architecture == "llama" else 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(name)
    mean = base.get_output_embeddings().weight.mean(dim=0)
    old = base.get_output_embeddings().weight.detach().clone()
    assert len(tokenizer) == len(old) + 1
    model = run_card(tmp_path / "out")["model"]
    merged = model.merge_and_unload().get_output_embeddings().weight
    head = [row for name, row in rows.items() if "lm_head" in name or architecture == "gpt2"][0]
    assert torch.equal(merged[-1], head[0]) and torch.equal(merged[:-1], old)
    assert (head[0] - mean).abs().max() > 1e-3, "trained away from the mean it began with"


def test_no_new_token_by_default(tiny, tmp_path, capsys):
    """And an eos that is also the pad token is learned."""
    from alpaca.models.load import load_tokenizer
    from train import make_supervised_data_module, parse_flags

    words = [
        f"--data_path={write_rows(tmp_path / 'rows.json', 8)}",
        f"--output_dir={tmp_path / 'out'}",
        "--use_cpu",
        f"--cache_dir={tmp_path}",
    ]
    for architecture, pad in (("llama", "<unk>"), ("gpt2", "<|endoftext|>"), ("opt", "<pad>")):
        name = tiny(architecture)
        model_args, data_args, _, args = parse_flags([f"--model_name_or_path={name}", *words, "--lora_r=8"])
        tokenizer, new = load_tokenizer(model_args, args)
        assert (tokenizer.pad_token, new, len(tokenizer)) == (pad, 0, len(AutoTokenizer.from_pretrained(name)))
        data = make_supervised_data_module(tokenizer, data_args, str(tmp_path))
        rows = [data["train_dataset"][0], data["train_dataset"][1]]
        assert len(rows[0]["input_ids"]) != len(rows[1]["input_ids"])
        batch = data["data_collator"](rows)
        for i, row in enumerate(rows):
            end = len(row["input_ids"]) - 1
            assert batch["labels"][i, end] == tokenizer.eos_token_id and batch["attention_mask"][i].sum() == end + 1
    assert "rows are padded with <|endoftext|>, id 0" in capsys.readouterr().out
    model_args, _, _, args = parse_flags([f"--model_name_or_path={tiny('gpt2')}", *words])
    assert load_tokenizer(model_args, args)[1] == 1, "without LoRA as in 2023"


@pytest.mark.slow
def test_rows_are_packed_on_a_base_of_half_precision(tiny, tmp_path, capsys):
    """Without --bf16 too: what its layers round is not a difference between packed and padded rows."""
    AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "half")
    train_here(tmp_path, output_dir="out", model_name_or_path=tmp_path / "half", max_steps=1)
    assert "padded batches" not in capsys.readouterr().out


# ---- mistakes ----


def test_new_rows_of_tied_embeddings_are_not_sharded(tiny):
    from alpaca.models.load import make_model
    from train import ModelArguments

    args = SimpleNamespace(fsdp=True, cache_dir=None)
    with pytest.raises(UsageError, match="--add_missing_tokens with --lora_r and --fsdp: .* tied embeddings"):
        make_model(ModelArguments(tiny("gpt2")), args, LoraArguments(lora_r=2), None, num_new_tokens=1)


def test_flags_that_mean_nothing_or_contradict(tmp_path, monkeypatch):
    from train import parse_flags

    for words, message in {
        "--lora_alpha 16": "--lora_alpha: has no effect without LoRA; add its rank, --lora_r 8",
        "--load_in_4bit": "--load_in_4bit: has no effect without LoRA",
        "--lora_r 0": "--lora_r 0 --lora_alpha 16: expected positive",
        "--lora_r 8 --lora_dropout 1": "--lora_dropout 1.0: expected 0 <= dropout < 1",
        "--lora_r 8 --load_in_4bit --load_in_8bit": "--load_in_8bit and --load_in_4bit",
        '--lora_r 8 --load_in_8bit --fsdp "full_shard auto_wrap"': "--load_in_8bit and --fsdp: quantized weights",
        "--lora_r 8 --neftune_noise_alpha 5": "--neftune_noise_alpha: is not supported",
    }.items():
        with pytest.raises(UsageError, match=message):
            parse_flags(["--data_path", "x.json", "--output_dir", str(tmp_path), *shlex.split(words)])
    monkeypatch.setattr("alpaca.models.device.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--load_in_8bit: needs bitsandbytes, .* pip install 'bitsandbytes"):
        LoraArguments(lora_r=8, load_in_8bit=True)


def test_target_modules(tiny):
    """peft itself takes a wrong name beside a right one without a word."""
    for architecture, wanted, expected in (
        ("llama", ["q_proj, v_proj,"], {"q_proj", "v_proj"}),
        ("llama", None, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", ["c_attn"], {"c_attn"}),
        ("llama", ["o_proj", "up_proj"], {"o_proj", "up_proj"}),
        ("opt", None, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    ):
        model = AutoModelForCausalLM.from_pretrained(tiny(architecture))
        adapted = add_lora(model, LoraArguments(lora_r=2, lora_target_modules=wanted), [], seed=0)
        found = {
            name.split(".lora_")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad
        }
        assert found == expected == set(adapted.peft_config["default"].target_modules)
    for wrong in (["q_proj,qkv"], ["mlp"]):
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
        with pytest.raises(
            UsageError, match=r"--lora_target_modules (qkv|mlp): .* it has down_proj, gate_proj, k_proj"
        ):
            add_lora(model, LoraArguments(lora_r=2, lora_target_modules=wrong), [], seed=0)


def test_an_adapter_is_no_base(tiny, tmp_path):
    from alpaca.training.preflight import check_is_model

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    add_lora(model, LoraArguments(lora_r=2), [], seed=0).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is a LoRA adapter, not a checkpoint; .*scripts.merge_lora --adapter"):
        check_is_model(str(tmp_path))


# ---- memory and speed ----


@pytest.mark.slow
def test_a_7b_fits_a_small_card(monkeypatch, capsys):
    """512 tokens, 24 GB in bfloat16 and 12 GB in 4 bits, of which CUDA and other programs take some."""
    rows = memory.Rows(longest=512, share=0.5, step=128 * 130)
    alone = flags_of(world_size=1, fsdp=None, gradient_accumulation_steps=32)
    for free, lora in {23.5e9: LoraArguments(lora_r=8), 11.5e9: LoraArguments(lora_r=8, load_in_4bit=True)}.items():
        monkeypatch.setattr(memory, "available_memory", lambda device, free=free: (free, 30e9))
        model, _ = memory.estimate_memory(alone, llama_7b(), rows, lora)
        output = capsys.readouterr().out
        assert "does not fit" not in output and model.trained == 19_988_480, "r x (4d x 4 + 3 (d + 11008)) x 32, d 4096"
    assert preflight.checkpoint_sizes(flags_of(save_only_model=False, save_dtype="float32"), model.trained)[0] < 250e6


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_estimate_counts_what_a_real_forward_pass_keeps(tiny, architecture):
    config, lora = AutoConfig.from_pretrained(tiny(architecture)), LoraArguments(lora_r=4)
    counted = memory.measure(config, 40, half=True, autocast=True, lora=lora, dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = {parameter.data_ptr() for parameter in base.parameters()}
    size = sum(p.numel() for p in base.parameters())
    model = add_lora(base, lora, [], seed=0).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = {}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def bytes_kept(rows):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            model(input_ids=torch.ones(rows, 40, dtype=torch.long), use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)

    assert counted.activations * 120 == pytest.approx(bytes_kept(6) - bytes_kept(3), rel=0.1)
    assert counted.trained == sum(parameter.numel() for parameter in trained)
    assert counted.weight_bytes == 2 * size + 4 * counted.trained
    cost, tables = Cost.of(model), [m.weight for m in base.modules() if isinstance(m, torch.nn.Embedding)]
    vectors = sum(p.numel() for p in base.parameters() if p.ndim == 1)
    head = base.get_output_embeddings().weight
    others = size - vectors - sum(t.numel() for t in tables) - (0 if any(head is t for t in tables) else head.numel())
    assert cost.head == 4 * head.numel() and cost.body == 4 * others + 6 * counted.trained


# ---- from training to a published diff ----


@pytest.mark.slow
@pytest.mark.parametrize("architecture, added", [("llama", True), pytest.param("gpt2", False, marks=STRESS)])
def test_merged_and_published(tiny, tmp_path, architecture, added):
    """train.py --lora_r, merge_lora, make_diff, recover: bit for bit, and it answers as base and adapter do."""
    import weight_diff
    from alpaca.inference.local_model import LocalModel
    from scripts.merge_lora import merge_lora

    base, out, merged, diff, recovered = tiny(architecture), *(tmp_path / name for name in ("out", "m", "d", "r"))
    train_here(tmp_path, output_dir="out", model_name_or_path=base, add_missing_tokens=added)
    merge_lora(str(out), str(merged))
    weight_diff.make_diff(path_raw=base, path_tuned=str(merged), path_diff=str(diff))
    weight_diff.recover(path_raw=base, path_diff=str(diff), path_tuned=str(recovered))
    files = [load_file(folder / "model.safetensors") for folder in (merged, recovered)]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, found = (LocalModel(folder).model(input_ids=ids).logits for folder in (out, merged))
        untrained = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    vocabulary = untrained.shape[-1]
    assert (found - expected).abs().max() < 1e-4 < (found[..., :vocabulary] - untrained).abs().max()
    tokenizer = AutoTokenizer.from_pretrained(recovered)
    assert len(tokenizer) == vocabulary + added and tokenizer.chat_template


@pytest.mark.slow
def test_a_base_of_the_same_shapes_is_told_from_the_one_of_the_training(tiny, tmp_path, capsys):
    """A LLaMA has the shapes of a Llama 2, and peft takes one for the other."""
    from alpaca.inference.local_model import LocalModel
    from scripts.merge_lora import merge_lora

    train_here(tmp_path, output_dir="out", model_name_or_path=tiny("llama"), max_steps=1)
    other = make_tiny_model(tmp_path / "other", "llama", hidden_size=32, seed=1)
    capsys.readouterr()
    for base, warned in ((tiny("llama"), False), (other, True)):
        LocalModel(tmp_path / "out", base=base)
        merge_lora(str(tmp_path / "out"), str(tmp_path / "merged"), base=str(base), overwrite=True)
        warning = f"WARNING: {tmp_path / 'out'} was trained on a base with other files than {base}"
        assert capsys.readouterr().out.count(warning) == 2 * warned

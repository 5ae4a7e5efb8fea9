"""Values of train.py's flags that no run can have: one message, before anything loads, and never a traceback."""

import json

import pytest

import train
from alpaca.common.arguments import FlagParser
from alpaca.common.errors import UsageError
from alpaca.models.lora import LoraArguments

pytestmark = pytest.mark.slow  # many small cases

CLASSES = (train.ModelArguments, train.DataArguments, LoraArguments, train.TrainingArguments)
NUMBERS = sorted(
    {action.dest for action in FlagParser(CLASSES, None, "train.py", ())._actions if action.type in (int, float)}
)
STRANGE = ("nan", "inf", "-inf", "-1", "0", "2", "0.5", "1000000000000", "1e400", "x")


def parsed(*words):
    return train.parse_flags(["--data_path=rows.json", "--output_dir=out", "--use_cpu=True", *words])


def outcome(*words):
    """The message, or None where the values are taken."""
    try:
        parsed(*words)
    except UsageError as error:
        return str(error)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_taken_or_refused_by_name(name):
    rank = ["--lora_r=8"] if name.startswith("lora_") and name != "lora_r" else []
    messages = {text: outcome(*rank, f"--{name}={text}") for text in STRANGE}
    for text, message in messages.items():
        assert message is None or name in message and "\n" not in message and len(message) < 400, (text, message)
    assert all(messages[text] for text in ("nan", "x")), "never a number"


def test_the_walk_has_seen_what_it_was_made_for():
    assert len(NUMBERS) > 30 and {"adam_beta1", "lora_dropout", "model_max_length", "save_steps"} <= set(NUMBERS)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--seed=-1", "--seed -1: expected 0 or more"),
        ("--seed=1099511627776", "--seed 1099511627776: expected at most 4,294,967,295"),
        ("--adam_beta1=2", "--adam_beta1 2.0: expected less than 1"),
        ("--adam_epsilon=-1", "--adam_epsilon -1.0: expected 0 or more"),
        ("--save_steps=0", "--save_steps 0: expected more than 0; --save_strategy no for never"),
        ("--logging_steps=-1", "--logging_steps -1.0: expected 0 or more"),
        ("--dataloader_num_workers=-1", "--dataloader_num_workers -1: expected 0 or more"),
        ("--model_max_length=1000000000000", "--model_max_length 1000000000000: expected at most 1,000,000,000"),
        ("--lora_r=1000000000", "--lora_r 1000000000: expected at most 65,536"),
        ("--gradient_accumulation_steps=1000000000000", "expected at most 1,000,000"),
        ("--label_smoothing_factor=1.5", "--label_smoothing_factor 1.5: expected at most 1"),
        ("--warmup_steps=inf", "--warmup_steps inf: expected at most 1,000,000,000"),
        ("--max_grad_norm=-1", "--max_grad_norm -1.0: expected 0 or more"),
        ("--learning_rate=inf", "--learning_rate inf: expected 0 or more, and finite"),
        ("--ddp_timeout=0", "--ddp_timeout 0: expected at least 1"),
        # what is not installed, or not logged in to
        ("--optim=galore_adamw", "--optim galore_adamw: needs --optim_target_modules"),
        ("--optim=galore_adamw --optim_target_modules=all-linear", "pip install galore-torch"),
        ("--optim=lomo", "pip install lomo-optim"),
        ("--optim=grokadamw", "pip install grokadamw"),
        ("--optim=schedule_free_adamw", "pip install schedulefree"),
        ("--optim=adamw_torch --optim_args=foo", "--optim adamw_torch --optim_args foo: "),
        ("--report_to=comet_ml", "--report_to comet_ml: is not installed; pip install comet-ml"),
        ("--torch_compile=True --torch_compile_backend=foo", "--torch_compile_backend foo: expected one of "),
        ("--push_to_hub=True", "--push_to_hub: needs a login to the hub"),
        ("--use_liger_kernel=True", "pip install liger-kernel"),
        ("--liger_kernel_config={x", "--liger_kernel_config {x: cannot be read as JSON"),
        ("--liger_kernel_config=[1]", "--liger_kernel_config [1]: cannot be read as JSON"),
        (
            "--linear_cross_entropy --label_smoothing_factor=0.1",
            "--linear_cross_entropy: not with --deepspeed or",
        ),
        # JSON
        ("--lr_scheduler_kwargs=[1]", "--lr_scheduler_kwargs [1]: expected a JSON object"),
        ("--gradient_checkpointing_kwargs={", "--gradient_checkpointing_kwargs {: cannot be read as JSON"),
        ('--gradient_checkpointing_kwargs={"x":1}', "--gradient_checkpointing_kwargs: unknown key 'x'"),
        ('--gradient_checkpointing_kwargs={"use_reentrant":[]}', "use_reentrant []: expected true or false"),
        ('--accelerator_config={"x":1}', "x"),
        ('--accelerator_config={"split_batches":[[]]}', None),
        (
            '--lr_scheduler_type=cosine_with_min_lr --lr_scheduler_kwargs={"min_lr":"x"}',
            "--lr_scheduler_type cosine_wi",
        ),
        ('--lr_scheduler_type=polynomial --lr_scheduler_kwargs={"power":"x"}', "--lr_scheduler_type polynomial"),
    ],
)
def test_a_value_is_refused_before_anything_loads(words, message, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    got = outcome(*words.split())
    if message:
        assert got and message in got and "\n" not in got, got


DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
OBJECTS = sorted({*train.TrainingArguments._VALID_DICT_FIELDS} - {"deepspeed", "fsdp_config"})


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("text", [DEEP, '{"a": ', "[]", "1", '"x"', "nowhere.json", "\x00"], ids=lambda text: text[:9])
def test_json_that_is_none_or_nested_deeply(name, text):
    message = outcome(f"--{name}={text}")
    assert message and f"--{name}" in message and len(message) < 500, message


def test_files_of_json_that_are_none(tmp_path):
    for content in (DEEP.encode(), b"[1]", b"\xff\xfe{", b'"x"', b""):
        (tmp_path / "c.json").write_bytes(content)
        for flags in (
            [f"--deepspeed={tmp_path / 'c.json'}"],
            ["--fsdp=full_shard", f"--fsdp_config={tmp_path}/c.json"],
        ):
            message = outcome(*flags)
            assert message and "c.json" in message and len(message) < 500, message


def test_a_token_is_in_no_argument(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    args = parsed("--hub_token=hf_secret")[-1]
    assert args.hub_token is None and "hf_secret" not in json.dumps(vars(args), default=str)
    import huggingface_hub

    assert huggingface_hub.get_token() == "hf_secret", "it is still used"


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "reduce_lr_on_plateau", "inverse_sqrt"])
def test_schedules_without_arguments_are_taken(kind):
    assert outcome(f"--lr_scheduler_type={kind}", "--eval_strategy=steps") is None

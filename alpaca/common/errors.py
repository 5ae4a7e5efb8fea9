"""How a user's mistake is reported: one message that says what was got, what was expected and how to fix it."""

import atexit
import dataclasses
import functools
import importlib.metadata
import inspect
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from alpaca.common.distributed import die_with_launcher

SECRETS = ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # environment
NO_SECRETS = ("none", "EMPTY", "ollama", "lm-studio", "dummy", "not-needed", "no-key-required", "placeholder")
SHORTEST_SECRET = 5  # characters; anything shorter stands in any text by chance
SHAPES = (  # of secrets that nobody has named to us: in a URL, a query, a header, a field, OpenAI's keys
    (re.compile(r"(?<=://)[^\s'\"]{0,2000}@"), "***@"),
    (re.compile(r"(?i)([?&](?:[\w-]*key|[\w-]*token|sig|signature|password|secret|code)=)[^&\s'\"]+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ***"),
    (
        re.compile(
            r"(?i)\b((?:api|access)[-_]?(?:key|token)|authorization|password|secret)(['\"]?\s{0,9}[:=]\s{0,9}['\"]?)"
            r"[^\s'\",;}&]+"
        ),
        r"\1\2***",
    ),
    (re.compile(r"\bsk-[\w-]{8,}"), "sk-***"),
)
_secrets: set[str] = set()
ROOT = Path(__file__).resolve().parents[2]
BROUGHT = ("numpy", "google", "huggingface_hub", "jinja2", "safetensors", "tokenizers", "tqdm", "yaml")  # by packages
WRITTEN = ("output", "path_tuned", "path_diff", "ratings_path", "eval_path")  # flags of what a command writes


class UsageError(ValueError):
    """A mistake of the user's: shown as one message, without a traceback."""


class InputError(UsageError):
    """A mistake in `about`: a file, a folder, a hub id or another text that the user gave.

    Library code names no flag. The command that was given `about`, or a folder that holds it, names its flag
    (`names_flags`).
    """

    def __init__(self, message: str, about: str | Path, written: bool = False, advice: Mapping[str, str] | None = None):
        """`written`: of equal paths the mistake is in that of what is made, not in that of what it is made from.
        `advice`: {parameter: end of the message for a command that has it}, which names it as a ParameterError does."""
        super().__init__(message)
        self.message, self.about, self.written, self.advice = message, str(about), written, dict(advice or {})


class ParameterError(UsageError):
    """A mistake in values of `parameters`. Where the message names one, as in "{max_cost} 0: …", the name is written as
    that of a flag by the command that has it (`names_flags`)."""

    def __init__(self, message: str, *parameters: str):
        self.message = message
        self.parameters = parameters
        super().__init__(self.naming({}))

    def naming(self, flags: Mapping[str, str]) -> str:
        """Return the message with the names of `flags`, by their parameter."""
        message = self.message
        for name in self.parameters:
            message = message.replace(f"{{{name}}}", flags.get(name, name))
        return message


def names_flags(command: Callable) -> Callable:
    """Make `command` name its flags in messages: before that of an InputError the flag whose value it is about, in that
    of a ParameterError each parameter that is a flag.

    The flags of a command are its parameters, and the fields of parameters that are dataclasses; also by the older
    names that `commands.task` was given.
    """

    @functools.wraps(command)
    def with_flags(*values: Any, **flags: Any) -> Any:
        try:
            return command(*values, **flags)
        except (InputError, ParameterError) as error:
            bound = inspect.signature(command).bind(*values, **flags)
            bound.apply_defaults()
            groups = [value for value in bound.arguments.values() if dataclasses.is_dataclass(value)]
            names = [*bound.arguments, *(field.name for group in groups for field in dataclasses.fields(group))]
            names = getattr(command, "_renamed", {}) | {name: name for name in names}
            if isinstance(error, InputError):
                for name in error.advice.keys() & names.keys():
                    error.message += error.advice.pop(name).replace(f"{{{name}}}", f"--{names[name]}")
                    error.args = (error.message,)
                _name_flag(error, _flags_of(bound.arguments))
            else:
                error.args = (error.naming({name: f"--{flag}" for name, flag in names.items()}),)
            raise

    return with_flags


def _flags_of(arguments: dict[str, Any]) -> dict[str, str]:
    """Return {name: value} of the flags that are texts, those in dataclasses and in **parameters too."""
    flags: dict[str, str] = {}
    for name, value in arguments.items():
        if dataclasses.is_dataclass(value):
            flags |= _flags_of({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        elif isinstance(value, dict):
            flags |= _flags_of(value)
        elif isinstance(value, str | Path) and str(value):
            flags[name] = str(value)
    return flags


def _name_flag(error: InputError, flags: dict[str, str]) -> None:
    """Put the flag before the message: "--path_raw llama: …", or "--path_raw: llama/config.json …"."""
    about = os.path.abspath(os.path.expanduser(error.about))
    paths = {name: os.path.abspath(os.path.expanduser(value)) for name, value in flags.items()}
    holding = [name for name, path in paths.items() if about == path or _is_beside(about, path)]
    if not holding:
        return
    longest = max(len(paths[name]) for name in holding)
    equal = [name for name in holding if len(paths[name]) == longest]
    written = [name for name in equal if name.startswith(WRITTEN)] if error.written else []
    name = (written or equal)[0]
    begins = error.message.startswith(tuple(given + end for given in (flags[name], paths[name]) for end in ":, "))
    error.args = (f"--{name}{'' if begins else ':'} {error.message}",)


def _is_beside(about: str, path: str) -> bool:
    """Return whether `about` lies in the folder `path`, or beside the file `path` as its journal does. The working
    folder, the default of some flags, holds everything and so tells nothing."""
    return about.startswith((path + os.sep, path + ".")) and path != os.getcwd()


class MalformedJSON(UsageError, json.JSONDecodeError):
    """What utils.jload raised in 2023, with `msg`, `doc`, `pos`, `lineno` and `colno`; its message names the file."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or what it is called where it has none, or only a missing key."""
    return ((str(error).strip() if not isinstance(error, KeyError) else "") or repr(error)).splitlines()[0]


def print_anything() -> None:
    """Let every text be printed where the terminal or pipe cannot have all letters (PYTHONIOENCODING=ascii, a Windows
    code page), or the text has half of one: as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


OWN_CODE = "brings code of its own, which would have to be run; such models are not taken"


@contextmanager
def loading(name: str | Path, what: str) -> Iterator[None]:
    """Raise InputError about `name` in place of whatever a library raises that reads somebody's files inside: "<name>:
    <what> (<the library's first line>)". A panic of a library in Rust is no Exception. A lost connection to another
    process is left as it is."""
    try:
        yield
    except UsageError:
        raise
    except BaseException as error:
        ours = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not ours or any(text in str(error) for text in LOST_CONNECTION):
            raise
        why = OWN_CODE if "trust_remote_code" in str(error) else f"{what} ({first_line(error)})"
        raise InputError(f"{name}: {why}", name) from error


HUB_SECONDS = 6.0  # for an answer


def reach_hub(name: str | Path, cache_dir: str | None = None) -> None:
    """Find out, once and within seconds, whether the hub answers, before a library asks it for the hub id `name`, again
    and again for minutes. If not, what is in the cache is used without asking.

    Raises:
        InputError: the hub does not answer, and nothing of `name` is in the cache.
    """
    if problem := why_no_hub(name):
        if not (Path(cache_dir or _hub_cache()) / f"models--{str(name).replace('/', '--')}").is_dir():
            raise InputError(f"{name}: no such folder, and as a hub id it is not in the cache; {problem}", name)
        print(f"note: {problem}; {name} is read from the cache", file=sys.stderr, flush=True)


def _hub_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def why_no_hub(name: str | Path) -> str | None:
    """Return why the hub cannot be asked for `name`, or None: it answers, or would not be asked for that."""
    if os.path.exists(os.path.expanduser(name)) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)):
        return None
    return _hub_problem()


@functools.cache
def _hub_problem() -> str | None:
    """Return what came of one try to reach the hub, or None if it answers or is not to be asked. After a failed one
    this process is offline for its libraries."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return None
    found: list[str] = []

    def ask() -> None:  # in a thread: looking up a name has no time limit
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            found.append("")
        except Exception as error:  # of the HTTP library, which is another one in another release
            found.append(first_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS + 2)
    if found == [""]:
        return None
    constants.HF_HUB_OFFLINE = True
    if datasets := sys.modules.get("datasets"):
        datasets.config.HF_HUB_OFFLINE = True
    why = found[0] if found else f"no answer within {HUB_SECONDS:.0f} s"
    return f"{constants.ENDPOINT} could not be reached (tried once: {why})"


LOST_CONNECTION = ("closed by peer", "reset by peer", "Broken pipe", "Connection was likely closed", "failed to recv")


def hide(*secrets: str | None) -> None:
    """Have `masked` hide these from now on: the key and the password that a server is asked with."""
    _secrets.update(secret for secret in secrets if secret)


def masked(text: str, shapes: bool = True) -> str:
    """Return the text without the secrets of this process, the one function that masks: for messages, tracebacks,
    journals, reports, and the answers of servers.

    Args:
        shapes: also what only looks like one. Not for answers, which may be about such texts.
    """
    known = _secrets | {value.strip() for name in SECRETS if (value := os.environ.get(name))}
    for secret in sorted(known - set(NO_SECRETS), key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, "***")
    for shape, stars in SHAPES if shapes else ():
        text = shape.sub(stars, text)
    return text


def starting(program: str) -> None:
    """For the top of a command, before the imports that take seconds, or fail outside of its environment: print that it
    is loading, and have a package that is not installed said in one line."""
    print_anything()
    sys.excepthook = functools.partial(_print_uncaught, program)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of a kernel that it does without
    if os.environ.get("RANK", "0") == "0":
        print(f"{program}: loading …", file=sys.stderr, flush=True)


def _print_uncaught(program: str, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if problem := _why_not_imported(error):
        write_torchrun_error(problem)
        print(f"\n{program}: error: {masked(problem)}\n", file=sys.stderr, flush=True)
        sys.exit(2)  # Python ends with this code
    sys.stderr.write(masked("".join(traceback.format_exception(kind, error, trace))))


def _why_not_imported(error: BaseException) -> str | None:
    """Return what to do where `error` is about a package of requirements.txt, or one that such a package brings, else
    None."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if not name:
        return None
    wanted = dict(re.findall(r"^(\w+)(.*)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))
    environment = ROOT / ".venv" / "bin" / "activate"
    advice = f"{'' if environment.exists() else 'make install, then '}source .venv/bin/activate"
    versions = {each: [found.version for found in importlib.metadata.distributions(name=each)] for each in wanted}
    missing = [each for each, found in versions.items() if not found]
    if isinstance(error, ModuleNotFoundError) and missing and name in {*missing, *BROUGHT}:
        return f"{missing[0]} is not installed in {sys.executable}: {advice}"
    if name not in wanted or name in missing:
        return None
    return (
        f"{name} {versions[name][0]} of {sys.executable} is not what is needed ({first_line(error)}); expected "
        f"{name}{wanted[name]}: {advice}"
    )


@contextmanager
def reported(program: str) -> Iterator[None]:
    """For a command's main block: a UsageError ends it with one message, and so does the loss of another process, which
    has said, or will say, why it ended.

    Under torchrun the process ends with its launcher. It also ends without the interpreter's shutdown, in which native
    threads of torch 2.13 now and then abort it (once in some 50 runs on CPU ranks): for torchrun the run has failed.
    """
    print_anything()
    sys.excepthook = functools.partial(_print_uncaught, program)
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    if launched:
        die_with_launcher()
    try:
        yield
        if launched:
            _leave(0)
    except SystemExit as error:
        if not launched or not isinstance(error.code, int):
            raise
        _leave(error.code)
    except UsageError as error:
        fail(str(error), program)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except RuntimeError as error:
        if not any(text in str(error) for text in LOST_CONNECTION):
            raise
        fail("the connection to another process is lost; what that one says is the cause", program)


def _leave(code: int) -> NoReturn:
    atexit._run_exitfuncs()  # loggers and trackers that have something left to write
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fail(message: str, program: str) -> NoReturn:
    """End the process with `message` on stderr, once per torchrun launch where all ranks make the same mistake.

    The other ranks wait before they speak: torchrun kills all of them when the first exits, and if that was rank 0 it
    has said the same.
    """
    write_torchrun_error(message)
    rank = int(os.environ.get("RANK", 0))
    if rank != 0:
        time.sleep(15)
        program = f"[rank {rank}] {program}"
    print(f"\n{program}: error: {masked(message)}\n", file=sys.stderr, flush=True)
    sys.exit(2)


def write_torchrun_error(message: str) -> None:
    """Leave `message` where torchrun reads it for its own summary, which it prints last; elsewhere do nothing."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}  # as torchrun's own `record` writes it
        try:
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        except OSError as error:
            print(f"note: {path} could not be written ({error})", file=sys.stderr, flush=True)


def format_bytes(size: float) -> str:
    """Return bytes as "1.3 GB" (10^9) or, where smaller, "0.9 MB"."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def format_first(numbers: Sequence[int]) -> str:
    """Return "0, 1, 2 …", of at most ten."""
    return ", ".join(map(str, numbers[:10])) + " …" * (len(numbers) > 10)


def format_rows(first: int, last: int) -> str:
    """Return "row 3" or "rows 3 to 5"."""
    return f"row {first}" if first == last else f"rows {first} to {last}"

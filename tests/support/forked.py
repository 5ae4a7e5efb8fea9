"""Runs of train.py that need not import torch and transformers first: processes forked from one that has done it.

    python tests/support/forked.py

reads a job a line, {"script", "words", "env", "ranks", "logs", "timeout"}, and answers with {"codes": [exit status of
every rank], "timed_out": whether it was ended for that}

A run of a tiny model is a second of work behind five to ten of imports, in every rank and in torchrun. Here everything
but that is real: a process per rank with its own environment, arguments, output, signals and exit status, gloo between
them, and the script executed as __main__. What only torchrun and a fresh interpreter show is tested by what
conftest.launcher starts: the README's command, the quickstart, the recipes, several nodes, mistakes under torchrun.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback

PRELOADED = (
    "train",
    "matplotlib.pyplot",
    "sentencepiece.sentencepiece_model_pb2",
    "torch.distributed.checkpoint",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print when they are imported
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


def run(script: str, words: list[str], env: dict[str, str], ranks: int, logs: list[list[str]], timeout: float) -> dict:
    """Run `script` in one process (ranks=0) or as the ranks of a launch; all end when one fails, as by torchrun."""
    port, children = str(free_port()), {}
    for rank in range(max(ranks, 1)):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            become(script, words, env | (as_rank(rank, ranks, port) if ranks else {}), *logs[rank])
        children[pid] = rank
    codes, end, timed_out = [0] * len(children), time.monotonic() + timeout, False
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        failed, timed_out = any(codes), timed_out or time.monotonic() > end
        if failed or timed_out:
            for left in children:
                os.kill(left, signal.SIGKILL if timed_out else signal.SIGTERM)
            end += 30
        time.sleep(0.01)
    return {"codes": codes, "timed_out": timed_out}


def as_rank(rank: int, ranks: int, port: str) -> dict[str, str]:
    """What torchrun tells its processes."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "forked"}
    return {name: str(value) for name, value in told.items()}


def become(script: str, words: list[str], env: dict[str, str], stdout: str, stderr: str) -> None:
    """In the forked process: be `python script words`. It does not return."""
    code = 1
    try:
        for number, path in ((1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


if __name__ == "__main__":
    serve()

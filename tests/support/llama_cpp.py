"""llama.cpp's own server with one model, as a process of its own: PyPI's xllamacpp, beside the rest (Makefile).

python tests/support/llama_cpp.py model.gguf     # prints its address, serves until its stdin ends
"""

import json
import os
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

BESIDE = Path(sys.prefix) / "llama_cpp"
INSTALLED = find_spec("xllamacpp") is not None or BESIDE.is_dir()
ONE, LONGEST = 1, 2048  # sequences at a time, tokens


def serve(path: str) -> None:
    """Serve with float32 keys and values, so that answers differ from transformers' by the order of sums alone."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.n_ctx, params.n_parallel = path, 0, LONGEST, ONE
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_prompt = params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more would wait for each other in a loop
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


class LlamaCpp:
    """Asks the server at `address`, which `process` is."""

    def __init__(self, address: str, process: subprocess.Popen | None = None):
        self.address, self.process = address, process

    def post(self, path: str, **body):
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def ids(self, text: str) -> list[int]:
        """Return the ids of a prompt, with the token that is put in front."""
        return self.post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Return the ids that follow on `ids`, at most `count`."""
        answer = self.post("/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True)
        return answer["tokens"]


@contextmanager
def running(path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BESIDE), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, __file__, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    )
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http"), f"no server for {path}"
        yield LlamaCpp(address, process)
    finally:
        process.stdin.close()
        process.wait(timeout=30)


if __name__ == "__main__":
    serve(sys.argv[1])

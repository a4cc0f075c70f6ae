"""Tiny data sets, environments and runs of the command lines, in this process or in their own.   (no tests here)"""

import contextlib
import functools
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import tokenize_docs
import torch

import train_gpt

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
BOS = 1
VOCAB_SIZE = 340
CPU = torch.device("cpu")
ALONE = train_gpt.Dist(0, 1, CPU)
TINY_MODEL = {
    "VOCAB_SIZE": VOCAB_SIZE,
    "TRAIN_SEQ_LEN": 32,
    "NUM_LAYERS": 2,
    "MODEL_DIM": 32,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "ROPE_DIMS": 4,
    "EXPERT_DIM": 8,
    "SHARED_DIM": 32,
    "LOOP_START": 0,
    "LOOP_END": 0,
    "LOOP_PASSES": 2,
    "PARALLEL_START_LAYER": 1,
}
TINY_RUN = {
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "COMPILE": 0,
    "WARMUP_STEPS": 0,
    "TRAIN_BATCH_TOKENS": 128,
    "MICRO_BATCH_TOKENS": 128,
    "ITERATIONS": 8,
    "MAX_WALLCLOCK_SECONDS": 0,
    "GPTQ_BATCHES": 2,
    "EVAL_STRIDE": 8,
    "RUN_ID": "run",
}


def make_sentences(seed: int, count: int) -> list[str]:
    """Documents of 20 to 60 words from one vocabulary of 200, the same for every seed."""
    words_rng, rng = random.Random(0), random.Random(seed)
    words = [
        "".join(words_rng.choices("abcdefghijklmnopqrstuvwxyz", k=words_rng.randint(2, 8)))
        for _ in range(200)
    ]
    return [" ".join(rng.choices(words, k=rng.randint(20, 60))) + " 12" for _ in range(count)]


@functools.cache
def tiny_tokenizer() -> bytes:
    """A serialized SentencePiece model of VOCAB_SIZE pieces, trained as the challenge trains its own."""
    return tokenize_docs.train_tokenizer(make_sentences(0, 200), VOCAB_SIZE)


def write_shard(
    path: Path, tokens: Iterable[int], magic=20240520, version=1, count=None, tail=b""
) -> Path:
    """A shard as the challenge defines it, or a broken one: 256 little-endian int32, then uint16 tokens."""
    tokens = np.asarray(tokens, dtype="<u2")
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + tokens.tobytes() + tail)
    return path


@dataclass(frozen=True)
class Dataset:
    """A folder of shards and the tokenizer that made them."""

    folder: Path
    tokenizer: Path


def write_dataset(
    folder: Path, train_seed: int = 1, val_seed: int = 2, val_docs: int = 8
) -> Dataset:
    """Two training shards and one validation shard of generated sentences in `folder`, and their tokenizer."""
    folder.mkdir(parents=True)
    tokenizer = folder / "tiny.model"
    tokenizer.write_bytes(tiny_tokenizer())
    sp = train_gpt.spm.SentencePieceProcessor(model_proto=tiny_tokenizer())
    contents = {
        "train_0": (train_seed, 40),
        "train_1": (train_seed + 100, 20),
        "val_0": (val_seed, val_docs),
    }
    for name, (seed, docs) in contents.items():
        tokens = [token for text in make_sentences(seed, docs) for token in [BOS, *sp.encode(text)]]
        write_shard(folder / f"fineweb_{name}.bin", tokens)
    return Dataset(folder, tokenizer)


def cli_env(dataset: Dataset, **knobs: object) -> dict[str, str]:
    """Knobs of a tiny run on the CPU; `knobs` come on top, and None takes one away."""
    paths = {"DATA_PATH": dataset.folder, "TOKENIZER_PATH": dataset.tokenizer}
    merged = {**TINY_MODEL, **TINY_RUN, **paths, **knobs}
    return {name: str(value) for name, value in merged.items() if value is not None}


def eval_env(dataset: Dataset, **knobs: object) -> dict[str, str]:
    """What eval_sliding.py needs: paths and how to run, and nothing about the model."""
    return cli_env(dataset, **{**dict.fromkeys([*TINY_MODEL, "TRAIN_BATCH_TOKENS"]), **knobs})


def full_environment(env: dict[str, str]) -> dict[str, str]:
    """This process's environment with exactly the knobs of `env`, and without torchrun's variables."""
    foreign = {name.upper() for name in train_gpt.ALL_KNOBS} | {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    return (
        {name: value for name, value in os.environ.items() if name not in foreign}
        | {"OMP_NUM_THREADS": "1"}
        | env
    )


@dataclass(frozen=True)
class Result:
    """Outcome of a command line: exit status and what it printed."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict:
        """The JSON object that the last printed line has to be."""
        return json.loads(self.out.splitlines()[-1])


def allow_every_attention_kernel() -> None:
    """What choose_attention() takes away from the process that it runs in."""
    for name in ("cudnn", "flash", "mem_efficient", "math"):
        vars(torch.backends.cuda)[f"enable_{name}_sdp"](True)


def run_in_process(
    entry: Callable[[], None], env: dict[str, str], cwd: Path, *argv: object
) -> Result:
    """What `python SCRIPT argv` does for the script whose main is `entry`, without another import of torch."""
    out, err, code, old_cwd = io.StringIO(), io.StringIO(), 0, Path.cwd()
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, old_cwd)
        stack.callback(allow_every_attention_kernel)
        os.chdir(cwd)
        stack.enter_context(mock.patch.dict(os.environ, full_environment(env), clear=True))
        stack.enter_context(mock.patch.object(sys, "argv", ["script.py", *map(str, argv)]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            train_gpt.run_entry_point(entry)
        except SystemExit as exit_info:
            code = exit_info.code
    return Result(code, out.getvalue(), err.getvalue())


def run_command(
    script: str, env: dict[str, str], cwd: Path, *argv: object, nproc: int = 1
) -> Result:
    """A script of the repository in its own process, under torchrun when there is more than one."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        if nproc > 1
        else []
    )
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, argv)]
    done = subprocess.run(
        command, env=full_environment(env), cwd=cwd, capture_output=True, text=True, timeout=120
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_refused(result: Result, *fragments: str) -> None:
    """Exit status 2 and a single line on stderr that holds every fragment."""
    assert result.code == 2, result
    assert result.err.startswith("error: "), result.err
    assert result.err.count("\n") == 1, result.err
    for fragment in fragments:
        assert fragment in result.err, result.err


def train_losses(log_text: str) -> list[float]:
    """The logged training losses in order."""
    return [
        float(loss)
        for loss in re.findall(r"^step:\d+/\d+ train_loss:(\S+)", log_text, re.MULTILINE)
    ]

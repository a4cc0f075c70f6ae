"""Tiny data sets, environments and runs of the command lines, in this process or in their own."""

import contextlib
import functools
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import tokenize_docs
import torch

import eval_sliding
import train_gpt

ROOT = Path(__file__).resolve().parents[1]
BOS = 1
VOCAB_SIZE = 340
ALONE = train_gpt.Dist(0, 1, torch.device("cpu"))
CPU = ALONE.device
MODEL_KNOBS = train_gpt.knob_fields(train_gpt.ModelConfig)
EVAL_KNOBS = train_gpt.knob_fields(eval_sliding.EvalConfig)

# A float32 model that runs in milliseconds on a CPU.
TINY = {
    "dtype": "float32",
    "compile": False,
    "max_wallclock_seconds": 0.0,
    "iterations": 4,
    "train_batch_tokens": 64,
    "micro_batch_tokens": 64,
    "gptq_batches": 2,
    "schedule": "sgdr",
    "vocab_size": 64,
    "train_seq_len": 16,
    "num_layers": 4,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 4,
    "dispatch": "masked",  # exact to the bit; what is grouped says so
    "num_experts": 4,
    "expert_dim": 8,
    "shared_dim": 32,
    "loop_start": 1,
    "loop_end": 2,
    "loop_passes": 2,
    "parallel_start_layer": 3,
}

# The same with the vocabulary that a tokenizer needs, and longer sequences.
TINY_KNOBS = {
    **TINY,
    "vocab_size": VOCAB_SIZE,
    "train_seq_len": 32,
    "train_batch_tokens": 128,
    "micro_batch_tokens": 128,
    "iterations": 8,
    "eval_stride": 8,
    "run_id": "run",
}
TINY_ENV = {
    name.upper(): str(int(value) if isinstance(value, bool) else value)
    for name, value in TINY_KNOBS.items()
}
TINY_MODEL = {name: TINY_ENV[name] for name in TINY_ENV if name.lower() in MODEL_KNOBS}


def make_sentences(seed: int, count: int) -> list[str]:
    """Return documents of 20 to 60 words from one vocabulary of 200, the same for every seed."""
    letters, rng = random.Random(0), random.Random(seed)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(letters.choices(alphabet, k=letters.randint(2, 8))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=rng.randint(20, 60))) + " 12" for _ in range(count)]


@functools.cache
def tiny_tokenizer(seed: int = 0, pieces: int = VOCAB_SIZE) -> bytes:
    """Return a SentencePiece model, serialized, trained as the challenge trains its own."""
    return tokenize_docs.train_tokenizer(make_sentences(seed, 200), pieces)


def write_shard(
    path: Path, tokens: Iterable[int], magic=20240520, version=1, count=None, tail=b""
) -> Path:
    """Write a shard as the challenge defines it, or a broken one: 256 int32, then uint16 tokens."""
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


def encoded(seed: int, docs: int, tokenizer: bytes) -> list[int]:
    """Return the tokens of generated documents, each after BOS."""
    sp = train_gpt.spm.SentencePieceProcessor(model_proto=tokenizer)
    return [token for text in make_sentences(seed, docs) for token in [BOS, *sp.encode(text)]]


def write_dataset(
    folder: Path, train_seed: int = 1, val_seed: int = 2, val_docs: int = 8
) -> Dataset:
    """Write two training shards and one validation shard of sentences, and their tokenizer."""
    folder.mkdir(parents=True)
    tokenizer = folder / "tiny.model"
    tokenizer.write_bytes(tiny_tokenizer())
    for name, seed, docs in (
        ("train_0", train_seed, 40),
        ("train_1", train_seed + 100, 20),
        ("val_0", val_seed, val_docs),
    ):
        write_shard(folder / f"fineweb_{name}.bin", encoded(seed, docs, tiny_tokenizer()))
    return Dataset(folder, tokenizer)


def cli_env(dataset: Dataset, **knobs: object) -> dict[str, str]:
    """Return the knobs of a tiny run; `knobs` come on top, and None takes one away."""
    paths = {"DATA_PATH": dataset.folder, "TOKENIZER_PATH": dataset.tokenizer}
    merged = {**TINY_ENV, **paths, **knobs}
    return {name: str(value) for name, value in merged.items() if value is not None}


def eval_env(dataset: Dataset, **knobs: object) -> dict[str, str]:
    """Return what eval_sliding.py needs: paths and how to run, and nothing about the model."""
    env = cli_env(dataset)
    for name in (*TINY_MODEL, "TRAIN_BATCH_TOKENS"):
        del env[name]
    return env | {name: str(value) for name, value in knobs.items()}


def full_environment(env: dict[str, str]) -> dict[str, str]:
    """Return this process's environment with exactly the knobs of `env`, no GPU and no torchrun."""
    foreign = {name.upper() for name in (*train_gpt.Hyperparameters().values(), *EVAL_KNOBS)}
    foreign |= {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env


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


@dataclass(frozen=True)
class Run:
    """A training in a folder of its own, which has to succeed."""

    folder: Path
    result: Result

    def __post_init__(self):
        assert self.result.code == 0, self.result.err

    @property
    def artifact(self) -> Path:
        return self.folder / "logs" / "run.ptz"

    @property
    def log(self) -> str:
        return (self.folder / "logs" / "run.txt").read_text(encoding="utf-8")

    @property
    def losses(self) -> list[float]:
        return train_losses(self.log)

    def same_as(self, other: "Run") -> bool:
        assert len(self.losses) == len(other.losses) == 8
        same_artifact = self.artifact.read_bytes() == other.artifact.read_bytes()
        return self.losses == other.losses and same_artifact


def without_progress(err: str) -> str:
    """Return what is on stderr beside the lines of stages that take more than 5 s."""
    return re.sub(r"^[A-Za-z ]+: \d+(s|% ETA).*\n", "", err, flags=re.MULTILINE)


def allow_every_attention_kernel() -> None:
    """Give back what choose_attention() takes away from the process that it runs in."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)


PACK_ONCE = functools.cache(train_gpt.pack_source)  # half of the time of a tiny run


def run_in_process(
    entry: Callable[[], None], env: dict[str, str], cwd: Path, *argv: object
) -> Result:
    """Do what `python SCRIPT argv` does for the script whose main is `entry`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code, old_cwd = 0, Path.cwd()
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, old_cwd)
        stack.callback(allow_every_attention_kernel)
        os.chdir(cwd)
        stack.enter_context(mock.patch.dict(os.environ, full_environment(env), clear=True))
        stack.enter_context(mock.patch.object(sys, "argv", ["script.py", *map(str, argv)]))
        stack.enter_context(mock.patch.object(train_gpt, "pack_source", PACK_ONCE))
        stack.enter_context(mock.patch.object(torch.cuda, "device_count", return_value=0))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            train_gpt.run_entry_point(entry)
        except SystemExit as exit_info:
            code = exit_info.code
    return Result(code, out.getvalue(), without_progress(err.getvalue()))


def train(folder: Path, dataset: Dataset, **knobs: object) -> Run:
    """Train in this process, in a folder that is made if need be."""
    folder.mkdir(exist_ok=True)
    return Run(folder, run_in_process(train_gpt.main, cli_env(dataset, **knobs), folder))


def score(artifact: Path, dataset: Dataset, *argv: object, **knobs: object) -> Result:
    """Score an artifact in this process, from the folder above its own."""
    folder = artifact.parents[1]
    name = artifact.relative_to(folder)
    return run_in_process(eval_sliding.main, eval_env(dataset, **knobs), folder, *argv, name)


def run_command(
    script: str, env: dict[str, str], cwd: Path, *argv: object, nproc: int = 1
) -> Result:
    """Run a script of the repository in its own process, or in several under torchrun."""
    launcher = []
    if nproc > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, argv)]
    done = subprocess.run(
        command, env=full_environment(env), cwd=cwd, capture_output=True, text=True, timeout=120
    )
    return Result(done.returncode, done.stdout, without_progress(done.stderr))


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, which has to be within a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def assert_refused(result: Result, *fragments: str) -> None:
    """Check for exit status 2 and a single line on stderr that holds every fragment."""
    assert result.code == 2, result
    assert result.err.startswith("error: "), result.err
    assert result.err.count("\n") == 1, result.err
    for fragment in fragments:
        assert fragment in result.err, result.err


def train_losses(log_text: str) -> list[float]:
    """Return the logged training losses in order."""
    lines = re.findall(r"^step:\d+/\d+ train_loss:(\S+)", log_text, re.MULTILINE)
    return [float(loss) for loss in lines]

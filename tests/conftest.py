"""Small models, data and a tokenizer that the test files share.   pytest tests

Helpers are plain functions (`from conftest import tiny_hp`), and fixtures of the same names hand them to a test.
"""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import tokenize_docs

from train_gpt import (
    GPT,
    SHARD_HEADER_INTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    Dist,
    Hyperparameters,
    build_expert_table,
)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # more threads only slow models this small down

ALONE = Dist(0, 1, torch.device("cpu"))
TINY = {
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
    "warmup_steps": 0,
    "max_wallclock_seconds": 0.0,
    "iterations": 4,
    "train_batch_tokens": 64,
    "micro_batch_tokens": 64,
    "vocab_size": 64,
    "train_seq_len": 16,
    "num_layers": 4,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 4,
    "num_experts": 4,
    "expert_dim": 8,
    "shared_dim": 32,
    "mu_rank": 8,
    "eval_stride": 8,
}
TOKENIZER_PIECES = 360


def tiny_hp(**overrides) -> Hyperparameters:
    """Valid knobs of a float32 CPU model that runs in milliseconds."""
    hp = Hyperparameters(**{**TINY, **overrides})
    hp.validate()
    return hp


def zipf_counts(vocab_size: int, total: int = 1_000_000, seed: int = 0) -> np.ndarray:
    """(V,) int64 token counts of a Zipf-Mandelbrot corpus, the usual fit for BPE, in an order unrelated to the id."""
    shares = 1 / (np.arange(vocab_size) + 3.7)
    counts = np.maximum(total * shares / shares.sum(), 1).astype(np.int64)
    return np.random.default_rng(seed).permutation(counts)


def make_model(hp: Hyperparameters, counts: np.ndarray | None = None, noise: float = 0.1) -> GPT:
    """An initialised and routed model, all of its parameters perturbed so that zero-initialised branches are alive."""
    model = GPT(hp)
    model.init_weights()
    model.expert_table.copy_(build_expert_table(hp, zipf_counts(hp.vocab_size) if counts is None else counts))
    generator = torch.Generator().manual_seed(hp.seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn(p.shape, generator=generator))
    return model


def make_ids(hp: Hyperparameters, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) random token ids."""
    return torch.randint(hp.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def write_shard(path: Path, tokens) -> Path:
    """Write token ids as one shard in the challenge's format, creating its folder. Returns the path."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
    return path


def make_sentences(count: int = 400, seed: int = 0) -> list[str]:
    """English-like sentences of invented words, with digits and a few characters outside ASCII."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeiourstlnmdcbpg", k=rng.randint(2, 8))) for _ in range(200)]
    sentences = [" ".join(rng.choices(words, k=rng.randint(4, 16))) + f" {rng.randint(0, 999)}." for _ in range(count)]
    return [s + " caf\u00e9 \u4e2d\u6587" if i % 9 == 0 else s for i, s in enumerate(sentences)]


@pytest.fixture(name="tiny_hp")
def _tiny_hp():
    return tiny_hp


@pytest.fixture(name="alone")
def _alone() -> Dist:
    return ALONE


@pytest.fixture(name="make_model")
def _make_model():
    return make_model


@pytest.fixture(name="write_shard")
def _write_shard():
    return write_shard


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    """A SentencePiece model of TOKENIZER_PIECES pieces with the challenge's settings."""
    path = tmp_path_factory.mktemp("tokenizer") / f"fineweb_{TOKENIZER_PIECES}_bpe.model"
    path.write_bytes(tokenize_docs.train_tokenizer(make_sentences(), TOKENIZER_PIECES))
    return path

"""Small models that the unit tests share.   from conftest import tiny_hp, make_model"""

import functools
import os

import numpy as np
import torch

from train_gpt import GPT, Dist, Hyperparameters, build_expert_table, role_of

torch.set_num_threads(
    int(os.environ.get("OMP_NUM_THREADS", "1"))
)  # more threads only slow models this small down

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
    "loop_start": 1,
    "loop_end": 2,
    "loop_passes": 2,
    "parallel_start_layer": 3,
    "schedule": "sgdr",
    "gptq_batches": 2,
    "eval_stride": 8,
}


def tiny_hp(**overrides) -> Hyperparameters:
    """Valid knobs of a float32 CPU model that runs in milliseconds; too few layers for the recurrence turn it off."""
    shallow = {"loop_passes": 1} if overrides.get("num_layers", 4) < 3 else {}
    hp = Hyperparameters(**{**TINY, **shallow, **overrides})
    hp.validate()
    return hp


def zipf_counts(vocab_size: int, total: int = 1_000_000, seed: int = 0) -> np.ndarray:
    """(V,) int64 token counts of a Zipf-Mandelbrot corpus, the usual fit for BPE, in an order unrelated to the id."""
    shares = 1 / (np.arange(vocab_size) + 3.7)
    counts = np.maximum(total * shares / shares.sum(), 1).astype(np.int64)
    return np.random.default_rng(seed).permutation(counts)


@functools.lru_cache
def markov_text(vocab_size: int, classes: int = 8, total: int = 20_000) -> np.ndarray:
    """(total,) uint16 tokens: classes, each of ids with one remainder, mostly follow each other in turn, and in a class
    ids are as frequent as in `zipf_counts`."""
    rng, counts = np.random.default_rng(1), zipf_counts(vocab_size)
    class_of = (
        np.cumsum(np.where(rng.random(total) < 0.8, 1, rng.integers(classes, size=total))) % classes
    )
    tokens = np.zeros(total, np.uint16)
    for each in range(classes):
        members, where = np.arange(each, vocab_size, classes), class_of == each
        tokens[where] = rng.choice(members, where.sum(), p=counts[members] / counts[members].sum())
    return tokens


@functools.lru_cache
def zipf_table(**knobs) -> torch.Tensor:
    """Experts by these counts and this text; kept, as clusters take longer than the models of most tests."""
    hp = tiny_hp(**knobs, loop_passes=1)
    return build_expert_table(hp, zipf_counts(hp.vocab_size), markov_text(hp.vocab_size))


TABLE_KNOBS = ("vocab_size", "num_layers", "moe_start_layer", "routing", "num_experts", "top_k")


def make_model(hp: Hyperparameters, noise: float = 0.1) -> GPT:
    """An initialised and routed model, all of its parameters perturbed so that zero-initialised branches are alive.
    Routers are perturbed further, so that they overrule HYBRID's table often and are rarely undecided."""
    model = GPT(hp)
    model.init_weights()
    model.expert_table.copy_(zipf_table(**{knob: getattr(hp, knob) for knob in TABLE_KNOBS}))
    generator = torch.Generator().manual_seed(hp.seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 3 * noise if role_of(name) == "router" else noise
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def make_ids(hp: Hyperparameters, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) random token ids."""
    return torch.randint(
        hp.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)
    )

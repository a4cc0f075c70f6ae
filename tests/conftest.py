"""Fixtures that several files share; models, ids, counts and a leak for the tiny model."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_cli import ALONE, TINY, Dataset, train, write_dataset

import train_gpt
from train_gpt import GPT, Checkpoints, Hyperparameters, TokenLoader, ValData

# More threads only slow models this small down.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Dataset:
    """A data set that no test changes."""
    return write_dataset(tmp_path_factory.mktemp("data") / "set", val_docs=3)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory, dataset) -> Path:
    """An artifact of that data set, for tests of its scores; they add to the log beside it."""
    return train(tmp_path_factory.mktemp("run"), dataset, GPTQ_BATCHES=0).artifact


def tiny_hp(**overrides) -> Hyperparameters:
    """Knobs of a float32 CPU model that runs in milliseconds; under 3 layers without recurrence."""
    knobs = {**TINY, **overrides}
    if knobs["num_layers"] < 3:
        knobs["loop_passes"] = overrides.get("loop_passes", 1)
    return Hyperparameters().override(**knobs)


def zipf_counts(vocab_size: int, total: int = 1_000_000, seed: int = 0) -> np.ndarray:
    """(V,) int64 token counts of a Zipf-Mandelbrot corpus, the usual fit for BPE.

    Their order is unrelated to the ids.
    """
    shares = 1 / (np.arange(vocab_size) + 3.7)
    counts = np.maximum(total * shares / shares.sum(), 1).astype(np.int64)
    return np.random.default_rng(seed).permutation(counts)


def make_model(hp: Hyperparameters, noise: float = 0.1) -> GPT:
    """An initialised and routed model whose parameters are perturbed, so that no branch is zero.

    Routers are perturbed further, so that they overrule the table of ROUTING=hybrid often.
    """
    model = GPT(hp.model, hp.torch_dtype)
    model.init_weights(hp.seed)
    counts = zipf_counts(hp.model.vocab_size)
    model.expert_table.copy_(train_gpt.build_expert_table(hp.model, counts))
    generator = torch.Generator().manual_seed(hp.seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 3 * noise if train_gpt.role_of(name) == "router" else noise
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def make_ids(hp: Hyperparameters, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(hp.model.vocab_size, (rows, length), generator=generator)


def make_checkpoints(hp: Hyperparameters) -> Checkpoints:
    """Those of a model that has taken a step, and of a loader of DATA_PATH; the log is nobody's."""
    model = make_model(hp)
    optimizers = train_gpt.build_optimizers(hp, model, ALONE)
    ids = make_ids(hp, 1, 4)
    model(ids, ids).backward()
    for optimizer in optimizers:
        optimizer.step()
    average = [p.detach().clone() for p in model.parameters()]
    return Checkpoints(lambda text: None, model, optimizers, average, TokenLoader(hp, ALONE))


def make_val(num_targets: int) -> ValData:
    """A validation split of random tokens that stand for random numbers of bytes."""
    generator = torch.Generator().manual_seed(num_targets)
    tokens = torch.randint(64, (num_targets + 1,), generator=generator)
    sizes = torch.randint(1, 9, (num_targets,), generator=generator)
    return ValData(tokens.int(), sizes.int(), "", False)


def attend_both_ways(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend to later tokens too, in place of `train_gpt.sdpa_attention`: a leak to plant."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

"""The one definition of the tests' tiny model, and models, ids, counts and a leak for it."""

import os

import numpy as np
import torch
import torch.nn.functional as F

from train_gpt import (
    GPT,
    Checkpoints,
    Dist,
    Hyperparameters,
    TokenLoader,
    ValData,
    build_expert_table,
    build_optimizers,
    role_of,
)

# More threads only slow models this small down.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

ALONE = Dist(0, 1, torch.device("cpu"))
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


def make_model(hp: Hyperparameters, noise: float = 0.1, context: int = 0) -> GPT:
    """An initialised and routed model whose parameters are perturbed, so that no branch is zero.

    Routers are perturbed further, so that they overrule the table of ROUTING=hybrid often.
    """
    model = GPT(hp.model, hp.torch_dtype, context)
    model.init_weights(hp.seed)
    model.expert_table.copy_(build_expert_table(hp.model, zipf_counts(hp.model.vocab_size)))
    generator = torch.Generator().manual_seed(hp.seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 3 * noise if role_of(name) == "router" else noise
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def make_ids(hp: Hyperparameters, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(hp.model.vocab_size, (rows, length), generator=generator)


def make_checkpoints(hp: Hyperparameters) -> Checkpoints:
    """Those of a model that has taken a step, and of a loader of DATA_PATH; the log is nobody's."""
    model = make_model(hp)
    optimizers = build_optimizers(hp, model, ALONE)
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

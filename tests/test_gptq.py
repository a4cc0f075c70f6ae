"""Properties of GPTQ and of the Hessians it gets.   pytest tests/test_gptq.py"""

import itertools
import math
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ALONE, make_model, tiny_hp, zipf_counts
from helpers_cli import write_shard
from torch import Tensor

import train_gpt
from train_gpt import (
    CHOICES,
    GPT,
    TABLE_SCORE,
    CastedLinear,
    CausalSelfAttention,
    Dist,
    Hyperparameters,
    Refusal,
    TokenLoader,
    TokenRoutedMLP,
    activate,
    collect_hessians,
    column_codes,
    dequantize,
    entropy_bytes,
    export,
    fit,
    gptq,
    load_artifact,
    matrices_of,
    quant_rule,
    quantize,
    role_of,
    round_to_nearest,
    step_codes,
    steps_of,
    submission_bytes,
)

SHA, DAMPING, CODE = "cd" * 32, 0.01, submission_bytes(Hyperparameters(), 0, "code")[0]


def silent(text: str) -> None:
    """A log that nobody reads."""


# ---- GPTQ ------------------------------------------------------------------------------------------------------------


def moments(columns: int, seed: int = 0, samples: int = 2000, correlation: float = 1.0) -> Tensor:
    """X^T X of inputs of unequal activity that share `correlation` times a few common causes."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(samples, max(columns // 4, 1), generator=generator)
    mixed = (
        causes @ torch.randn(causes.shape[1], columns, generator=generator) / causes.shape[1] ** 0.5
    )
    x = correlation * mixed + 0.3 * torch.randn(samples, columns, generator=generator)
    x = x * (0.5 * torch.randn(columns, generator=generator)).exp()
    return x.mT @ x


def matrix(rows: int, columns: int, seed: int = 1) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def steps_for(weight: Tensor, bits: int = 6, clip: float = 12.85) -> Tensor:
    return steps_of(step_codes(weight, bits, clip)).expand_as(weight)


def error_of(weight: Tensor, restored: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T): the squared error of the outputs, summed over the inputs that H was made from."""
    off = (weight - restored).double()
    return torch.einsum("rc,cd,rd->", off, hessian.double(), off).item()


def plain_gptq(
    weight: Tensor, step: Tensor, bits: int, hessian: Tensor, damping: float, sort: bool = True
) -> Tensor:
    """Algorithm of the papers without blocks or factorizations: round a column, move its error to the columns left
    (OBQ), and take it out of the inverse Hessian by Gaussian elimination. float64."""
    H, w, s = (t.double().numpy().copy() for t in (hessian, weight, step))
    order = np.argsort(-np.diag(H), kind="stable") if sort else np.arange(len(H))
    inverse = np.linalg.inv(H + damping * np.diag(H).mean() * np.eye(len(H)))
    symbols, levels = np.zeros_like(w), 2 ** (bits - 1) - 1
    for at, j in enumerate(order):
        symbols[:, j] = np.clip(np.round(w[:, j] / s[:, j]), -levels, levels)
        error, left = (w[:, j] - symbols[:, j] * s[:, j]) / inverse[j, j], order[at + 1 :]
        w[:, left] -= np.outer(error, inverse[j, left])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.from_numpy(symbols).float()


@pytest.mark.parametrize("damping", [0.001, 0.01, 0.3])
@pytest.mark.parametrize("columns", [1, 5, 127, 128, 130, 300])
@pytest.mark.parametrize(("bits", "clip"), [(6, 12.85), (3, 2.0)])
def test_symbols_are_those_of_the_plain_algorithm(columns, bits, clip, damping):
    weight, hessian = matrix(16, columns), moments(columns)
    step = steps_for(weight, bits, clip)
    before = [t.clone() for t in (weight, step, hessian)]
    symbols = gptq(weight, step, bits, hessian, damping)
    assert (symbols.shape, symbols.dtype) == (weight.shape, torch.float32)
    assert all(itertools.starmap(torch.equal, zip((weight, step, hessian), before, strict=True)))
    expected = plain_gptq(weight, step, bits, hessian, damping)
    same_rows = (symbols == expected).all(-1)
    assert (
        same_rows.sum() >= len(weight) - 1
    )  # a tie that rounds differently changes the rest of its row
    if columns > 100:
        unsorted = plain_gptq(weight, step, bits, hessian, damping, sort=False)
        assert (unsorted == expected).double().mean() < 0.9


@pytest.mark.parametrize("columns", [64, 300])
def test_a_step_per_weight_is_used_in_its_place(columns):
    weight, hessian, generator = (
        matrix(8, columns),
        moments(columns),
        torch.Generator().manual_seed(3),
    )
    step = 0.01 * torch.exp2(torch.randint(-4, 4, weight.shape, generator=generator) / 2)
    symbols = gptq(weight, step, 6, hessian, DAMPING)
    assert (symbols == plain_gptq(weight, step, 6, hessian, DAMPING)).all(-1).sum() >= 7


@pytest.mark.parametrize("columns", [40, 300])
def test_outputs_are_much_closer_than_those_of_rounding_to_nearest(columns):
    weight, hessian = matrix(32, columns), moments(columns)
    step = steps_for(weight)
    symbols, near = gptq(weight, step, 6, hessian, DAMPING), round_to_nearest(weight, step, 6)
    errors = [error_of(weight, s * step, hessian) for s in (symbols, near)]
    assert 0 < errors[0] < 0.35 * errors[1]
    assert error_of(weight, symbols * step, torch.eye(columns)) > error_of(
        weight, near * step, torch.eye(columns)
    )


@pytest.mark.parametrize("columns", [5, 300])
def test_independent_inputs_leave_nothing_but_rounding_to_nearest(columns):
    weight, step = matrix(32, columns), steps_for(matrix(32, columns))
    near, hessian = round_to_nearest(weight, step, 6), moments(columns)
    assert torch.equal(gptq(weight, step, 6, hessian.diagonal().diag(), DAMPING), near)
    assert torch.equal(gptq(weight, step, 6, torch.zeros_like(hessian), DAMPING), near)
    assert not torch.equal(gptq(weight, step, 6, hessian, DAMPING), near)


@pytest.mark.parametrize("columns", [20, 300])
def test_inputs_that_were_never_active_are_rounded_to_nearest_and_change_no_other(columns):
    weight, hessian, dead = matrix(16, columns), moments(columns), torch.arange(columns) % 5 == 3
    step = steps_for(weight)
    hessian[dead], hessian[:, dead] = 0, 0
    symbols = gptq(weight, step, 6, hessian, DAMPING)
    assert symbols.isfinite().all()
    assert torch.equal(symbols[:, dead], round_to_nearest(weight, step, 6)[:, dead])
    alive, share = ~dead, (~dead).double().mean().item()  # of the mean that scales the damping
    alone = gptq(weight[:, alive], step[:, alive], 6, hessian[alive][:, alive], DAMPING * share)
    assert (symbols[:, alive] == alone).all(-1).sum() >= 15
    assert not torch.equal(symbols, round_to_nearest(weight, step, 6))


def spoiled(kind: str, columns: int = 40) -> Tensor:
    """A Hessian that is of no use."""
    hessian = moments(columns)
    if kind == "negative":
        return -hessian
    if kind == "indefinite":
        hessian[3, 4] = hessian[4, 3] = 10 * hessian.diagonal().max()
    elif kind == "dead_but_correlated":
        hessian[3, 3] = 0.0
    else:
        hessian[3, 3 + ("off" in kind)] = float(kind.split("_")[0])
        hessian = (
            hessian.maximum(hessian.mT) if kind.split("_")[0] == "inf" else hessian + 0 * hessian.mT
        )
    return hessian


SPOILED = [
    "nan",
    "nan_off",
    "inf",
    "inf_off",
    "-inf",
    "negative",
    "indefinite",
    "dead_but_correlated",
]


@pytest.mark.parametrize("kind", SPOILED)
def test_a_hessian_of_no_use_gives_none(kind):
    weight = matrix(8, 40)
    assert gptq(weight, steps_for(weight), 6, moments(40), DAMPING) is not None
    assert gptq(weight, steps_for(weight), 6, spoiled(kind), DAMPING) is None


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("rank", [1, 3])
def test_damping_makes_few_samples_enough(rank, scale):
    weight, samples = (
        matrix(8, 200),
        torch.randn(rank, 200, generator=torch.Generator().manual_seed(5)),
    )
    step, hessian = steps_for(weight), scale * samples.mT @ samples
    symbols = gptq(weight, step, 6, hessian, DAMPING)
    assert symbols.isfinite().all()
    near = round_to_nearest(weight, step, 6)
    assert error_of(weight, symbols * step, hessian) < 0.02 * error_of(weight, near * step, hessian)
    assert torch.equal(symbols, gptq(weight, step, 6, hessian / scale, DAMPING))


@pytest.mark.parametrize("seed", range(10))
def test_without_damping_a_hessian_works_or_gives_none(seed):
    weight, hessian, generator = (
        matrix(8, 64),
        moments(64, seed),
        torch.Generator().manual_seed(seed),
    )
    assert gptq(weight, steps_for(weight), 6, hessian, 0.0) is not None
    samples = torch.randn(200, 64, generator=generator)
    samples[:, 1] = samples[:, 0]  # singular but for rounding
    symbols = gptq(weight, steps_for(weight), 6, samples.mT @ samples, 0.0)
    assert symbols is None or symbols.isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symbols_stay_within_their_bits(bits):
    weight, levels, base = matrix(16, 300), 2 ** (bits - 1) - 1, moments(300, correlation=5.0)
    symbols = gptq(weight, steps_for(weight, bits, 0.5), bits, base, DAMPING)
    assert 0.97 * levels <= symbols.abs().max() <= levels
    assert torch.equal(symbols, symbols.round())
    coarse = gptq(
        weight, steps_for(weight, bits, 0.5) / 4, bits, base, DAMPING
    )  # most weights do not fit
    assert coarse.abs().max() == levels
    assert coarse.isfinite().all()


# ---- Quantizer -------------------------------------------------------------------------------------------------------


def nearest_and_gptq(hp: Hyperparameters, state: dict, hessians: dict) -> tuple[dict, dict, list]:
    """Parts rounded to nearest, parts with Hessians, and the names of those that were of no use."""
    return quantize(hp, state)[0], *quantize(hp, state, hessians=hessians)


def test_active_inputs_of_the_embedding_get_finer_steps_by_the_fourth_root():
    weight, activity = matrix(64, 40), torch.logspace(-2, 2, 40)
    plain = column_codes(None, weight)
    assert (steps_of(plain) == 1).all()
    assert torch.equal(column_codes(torch.full((40, 40), math.nan), weight), plain)
    assert torch.equal(column_codes(torch.eye(40), weight), plain)
    assert torch.equal(column_codes(torch.zeros(40, 40), weight), plain)
    gains = steps_of(column_codes(torch.diag(activity), weight))
    torch.testing.assert_close(gains, activity**-0.25, rtol=0.05, atol=0)
    extreme = steps_of(
        column_codes(torch.diag(torch.tensor([1e30, *[1.0] * 38, 0.0])), weight[:, :40])
    )
    assert 1 / 16 <= extreme.min() < extreme.max() <= 8


def test_a_dominant_input_of_the_head_no_longer_dominates_the_error():
    hp = tiny_hp(target_bytes=0, matrix_clip=12.85, embed_clip=15.0)
    state = make_model(hp).state_dict()
    features = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    features[:, 5] = 30 + features[:, 5]
    hessian, weight = features.T @ features, state["tok_emb.weight"]
    near, parts, _ = nearest_and_gptq(hp, state, {"tok_emb.weight": hessian})
    errors = [
        error_of(weight, dequantize(*some["tok_emb.weight"]), hessian) for some in (near, parts)
    ]
    assert errors[1] < 0.2 * errors[0]
    sizes = [entropy_bytes(*some["tok_emb.weight"]) for some in (near, parts)]
    assert sizes[1] < 1.05 * sizes[0]


def test_only_tensors_with_a_hessian_change_and_steps_only_the_embeddings():
    hp = tiny_hp()
    state = make_model(hp).state_dict()
    hessians = {"tok_emb.weight": moments(32), "blocks.1.attn.c_k.weight": moments(32, 1)}
    near, parts, unusable = nearest_and_gptq(hp, state, hessians)
    assert (unusable, list(parts)) == ([], list(state))
    for name, part in parts.items():
        assert torch.equal(part[0], near[name][0]) == (name not in hessians), name
        assert part[0].dtype == near[name][0].dtype
        assert len(part) == 1 or torch.equal(part[1], near[name][1]) or name == "tok_emb.weight"
    for name, hessian in hessians.items():
        bits, clip = quant_rule(hp, name)
        gains = (
            steps_of(column_codes(hessian, state[name]))
            if name == "tok_emb.weight"
            else torch.ones(32)
        )
        steps = steps_for(state[name] / gains, bits, clip) * gains
        assert torch.equal(
            parts[name][0].float(), gptq(state[name], steps, bits, hessian, hp.gptq_damping)
        )
    damped = quantize(replace(hp, gptq_damping=0.5), state, hessians=hessians)[0]
    coarser = quantize(hp, state, 2.0, hessians)[0]
    for name in hessians:
        assert not torch.equal(damped[name][0], parts[name][0])
        assert coarser[name][0].float().std() < 0.8 * parts[name][0].float().std()


def test_experts_are_quantized_each_by_its_own_hessian():
    hp, name = tiny_hp(), "blocks.1.mlp.expert_up"
    state = make_model(hp).state_dict()
    hessian = torch.stack([moments(32, seed) for seed in range(hp.num_experts)])
    parts = quantize(hp, state, hessians={name: hessian})[0]
    for expert, weight in enumerate(state[name]):
        direct = gptq(weight, steps_for(weight), 6, hessian[expert], hp.gptq_damping)
        assert torch.equal(parts[name][0][expert].float(), direct)
    other = quantize(hp, state, hessians={name: hessian.flip(0)})[0]
    assert not torch.equal(other[name][0], parts[name][0])


@pytest.mark.parametrize("kind", SPOILED)
def test_a_tensor_whose_hessian_is_of_no_use_is_rounded_to_nearest_and_named(kind):
    hp, bad = tiny_hp(), "blocks.1.attn.c_k.weight"
    state = make_model(hp).state_dict()
    hessians = {
        "blocks.0.attn.c_k.weight": moments(32),
        bad: spoiled(kind, 32),
        "tok_emb.weight": moments(32),
    }
    near, parts, unusable = nearest_and_gptq(hp, state, hessians)
    assert unusable == [bad]
    assert {n for n in parts if not torch.equal(parts[n][0], near[n][0])} == set(hessians) - {bad}


def test_one_expert_whose_hessian_is_of_no_use_leaves_the_others_alone():
    hp, name = tiny_hp(), "blocks.1.mlp.expert_up"
    state = make_model(hp).state_dict()
    hessian = torch.stack([moments(32), spoiled("nan", 32), moments(32, 1), torch.zeros(32, 32)])
    near, parts, unusable = nearest_and_gptq(hp, state, {name: hessian})
    assert unusable == [name]
    same = [torch.equal(new, old) for new, old in zip(parts[name][0], near[name][0], strict=True)]
    assert same == [False, True, False, True]


def test_matrices_that_share_a_hessian():
    state = make_model(tiny_hp(moe_start_layer=1)).state_dict()
    experts = state["blocks.1.mlp.expert_down"]
    for name, expected in {
        "tok_emb.weight": [[state["tok_emb.weight"]]],
        "blocks.0.mlp.down.weight": [[state["blocks.0.mlp.down.weight"]]],
        "blocks.1.mlp.up.weight": [[state["blocks.1.mlp.up.weight"]]],
        "blocks.1.mlp.expert_up": [[matrix] for matrix in state["blocks.1.mlp.expert_up"]],
        "blocks.1.mlp.down.weight": [[state["blocks.1.mlp.down.weight"], *experts]],
    }.items():
        found = matrices_of(state, name)
        assert [len(job) for job in found] == [len(job) for job in expected]
        assert all(
            itertools.starmap(torch.equal, zip(chain(*found), chain(*expected), strict=True))
        ), name


def joint_moments(hp: Hyperparameters, layer: int = 0, tokens: int = 4000) -> Tensor:
    """X^T X of shared and routed hidden units that have their causes in common; a token has one expert."""
    generator = torch.Generator().manual_seed(layer)
    causes = torch.randn(tokens, 12, generator=generator)
    shared = causes @ torch.randn(12, hp.shared_dim, generator=generator)
    routed = (
        causes @ torch.randn(12, hp.num_experts * hp.expert_dim, generator=generator)
    ).unflatten(1, (-1, 8))
    chosen = torch.randint(hp.num_experts, (tokens,), generator=generator)
    routed = routed * F.one_hot(chosen, hp.num_experts)[..., None]
    x = torch.cat([shared, routed.flatten(1)], 1)
    x = x + 0.1 * torch.randn(x.shape, generator=generator) * (x != 0)
    return x.mT @ x


def joined(parts: dict, layer: int = 0) -> Tensor:
    """The down projections of a layer side by side, dequantized: (D, shared and routed hidden units)."""
    shared, experts = (
        dequantize(*parts[f"blocks.{layer}.mlp.{n}"]) for n in ("down.weight", "expert_down")
    )
    return torch.cat([shared, *experts], -1)


def test_down_projections_of_a_layer_make_up_for_each_others_errors():
    hp, name = tiny_hp(), "blocks.0.mlp.down.weight"
    state = make_model(hp).state_dict()
    hessian, experts = joint_moments(hp), state["blocks.0.mlp.expert_down"]
    near, parts, unusable = nearest_and_gptq(hp, state, {name: hessian})
    assert unusable == []
    changed = {n for n in parts if not torch.equal(parts[n][0], near[n][0])}
    assert changed == {name, "blocks.0.mlp.expert_down"}
    assert parts["blocks.0.mlp.expert_down"][0].shape == experts.shape
    weight = torch.cat([state[name], *experts], -1)
    step = torch.cat([steps_for(state[name]), *steps_for(experts)], -1)
    direct = gptq(weight, step, 6, hessian, hp.gptq_damping)
    torch.testing.assert_close(joined(parts), direct * step, rtol=1e-6, atol=0)
    separate, start = [], 0
    for piece in (state[name], *experts):
        block = slice(start, start + piece.size(-1))
        alone = gptq(piece, step[:, block], 6, hessian[block, block], hp.gptq_damping)
        separate, start = [*separate, alone * step[:, block]], block.stop
    errors = [
        error_of(weight, w, hessian) for w in (joined(parts), torch.cat(separate, -1), joined(near))
    ]
    assert errors[0] < 0.75 * errors[1] < 0.5 * errors[2]


def test_fit_with_hessians_meets_the_target_as_well():
    hp = tiny_hp(
        vocab_size=1024,
        model_dim=96,
        rope_dims=8,
        shared_dim=256,
        expert_dim=32,
        num_layers=2,
        target_bytes=0,
    )
    state = make_model(hp).state_dict()
    hessians = {
        n: moments(t.size(-1)) for n, t in state.items() if role_of(n) in ("embedding", "matrix")
    }
    hessians |= {f"blocks.{layer}.mlp.down.weight": moments(256 + 4 * 32) for layer in range(2)}
    hessians["tok_emb.weight"] = torch.full((96, 96), math.nan)
    plain = fit(hp, state, SHA, "zstd", hessians)
    assert plain.unusable == ["tok_emb.weight"]
    target = int(0.9 * len(plain.artifact))
    fitted = fit(replace(hp, target_bytes=CODE + target), state, SHA, "zstd", hessians)
    assert 0.998 * target <= len(fitted.artifact) <= target
    assert fitted.unusable == ["tok_emb.weight"]
    parts, _ = quantize(hp, state, fitted.factor, hessians)
    near, _ = quantize(hp, state, fitted.factor)
    for name, part in fitted.parts.items():
        assert torch.equal(part[0], parts[name][0]), name
    assert not torch.equal(parts["blocks.0.mlp.up.weight"][0], near["blocks.0.mlp.up.weight"][0])


# ---- Hessians --------------------------------------------------------------------------------------------------------


MODES = [
    {"mu": mu, "dispatch": dispatch}
    for mu in CHOICES["mu"].split()
    for dispatch in CHOICES["dispatch"].split()
]
MODES += [{"activation": a, "dispatch": "grouped"} for a in ("relu2", "swiglu")] + [
    {"moe_start_layer": 2}
]
MODES += [
    {"routing": "dense"},
    {"routing": "dense", "mu": "lowrank", "activation": "swiglu"},
    {"loop_passes": 3},
]
MODES += [
    {"routing_per_pass": False},
    {"num_experts": 3, "routing": "hash"},
    {"routing": "cluster"},
]
MODES += [{"routing": routing} for routing in TABLE_SCORE] + [
    {"routing": "learned", "mu": "pid", "activation": "swiglu"}
]
MODES += [
    {"top_k": 2},
    {"top_k": 2, "dispatch": "grouped"},
    {"top_k": 2, "num_experts": 2, "routing": "learned"},
]
MODES += [{"top_k": 2, "routing": routing} for routing in ("cluster", "hybrid", "soft")]


def label(mode: dict) -> str:
    return "-".join(f"{knob}_{value}" for knob, value in mode.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One training shard of tokens by Zipf's law, with a document end now and then."""
    path, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    shares = zipf_counts(64) / zipf_counts(64).sum()
    write_shard(path / "fineweb_train_000000.bin", rng.choice(64, 2000, p=shares))
    return path


def data_hp(folder: Path, **knobs) -> Hyperparameters:
    return tiny_hp(**{"data_path": str(folder), **knobs})


def collected(hp: Hyperparameters, model: GPT, dist: Dist = ALONE) -> dict[str, Tensor]:
    return collect_hessians(hp, dist, silent, model, TokenLoader(hp, dist))[0]


class Observed:
    """Inputs X of every matrix on the loader's first batches, each (tokens, C), from the modules' own inputs."""

    def __init__(self, hp: Hyperparameters, model: GPT, batches: int):
        self.hp, self.model, self.inputs, loader = hp, model, {}, TokenLoader(hp, ALONE)
        hooks = [
            m.register_forward_pre_hook(self.hook(name, m)) for name, m in model.named_modules()
        ]
        with torch.no_grad():
            for _ in range(batches):
                self.ids, self.passes = loader.next_batch()[0], Counter()
                self.add("tok_emb.weight", model.features(self.ids)[0])
        for hook in hooks:
            hook.remove()

    def add(self, name: str, x: Tensor) -> None:
        self.inputs.setdefault(name, []).append(x.reshape(-1, x.size(-1)).double())

    def hook(self, name: str, module: torch.nn.Module):
        def attention(module: CausalSelfAttention, args: tuple) -> None:
            x, mu, *_ = args
            for i, part in enumerate("qkv"):
                guided = x + module.mu_gain[i] * mu if self.hp.mu in ("vector", "pid") else x
                self.add(f"{name}.c_{part}.weight", guided)

        def routed(module: TokenRoutedMLP, args: tuple) -> None:
            x, E, layer = args[0].flatten(0, 1), self.hp.num_experts, int(name.split(".")[1])
            shift = self.passes[layer] * self.hp.routing_per_pass
            self.passes[layer] += 1
            table = self.model.expert_table[layer - self.hp.moe_start_layer].long()
            named = (table[self.ids.flatten()] + shift) % E
            factors = self.factors(
                module, x, torch.stack([(named == e).any(-1) for e in range(E)], -1).float()
            )
            hidden = [activate(x @ module.up.weight.T, self.hp.activation)]
            for e in range(E):
                mine = factors[:, e, None]
                hidden.append(activate(x @ module.expert_up[e].T, self.hp.activation) * mine)
                self.add(f"{name}.expert_up.{e}", x[mine[:, 0] > 0])
            self.add(f"{name}.up.weight", x)
            self.add(f"{name}.down.weight", torch.cat(hidden, -1))

        if isinstance(module, CausalSelfAttention):
            return attention
        if isinstance(module, TokenRoutedMLP) and module.routed:
            return routed
        theirs = any(part in name for part in (".c_q", ".c_k", ".c_v"))
        mine = (
            name.endswith((".up", ".down"))
            and self.model.get_submodule(name.rpartition(".")[0]).routed
        )
        if isinstance(module, CastedLinear) and not theirs and not mine:
            return lambda module, args: self.add(f"{name}.weight", args[0])
        return lambda module, args: None

    def factors(self, module: TokenRoutedMLP, x: Tensor, named: Tensor) -> Tensor:
        """What each expert's hidden units are multiplied by, (tokens, E), given the experts that the table names."""
        routing, E, K = self.hp.routing, self.hp.num_experts, self.hp.top_k
        if routing not in ("learned", "hybrid", "soft"):
            return named
        scores = (
            x @ module.router.T + {"learned": 1e-3, "hybrid": 2.0, "soft": 0.0}[routing] * named
        )
        if routing == "soft":
            return E * scores.exp() / scores.exp().sum(-1, keepdim=True)
        return (scores >= scores.kthvalue(E - K + 1, dim=-1, keepdim=True).values).float()

    def moments(self, name: str) -> Tensor:
        x = torch.cat(self.inputs[name])
        return (x.T @ x).float()

    def hessians(self) -> dict[str, Tensor]:
        result = {name: self.moments(name) for name in self.inputs if "expert_up" not in name}
        for name in {name.rpartition(".")[0] for name in self.inputs if "expert_up" in name}:
            result[name] = torch.stack(
                [self.moments(f"{name}.{e}") for e in range(self.hp.num_experts)]
            )
        return result


def assert_same_hessians(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, hessian in expected.items():
        torch.testing.assert_close(
            found[name], hessian, rtol=1e-3, atol=1e-4 * hessian.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("mode", MODES, ids=label)
def test_hessians_are_the_moments_of_the_inputs(folder, mode):
    hp = data_hp(folder, **mode, gptq_batches=3)
    model = make_model(hp)
    expected, found = Observed(hp, model, 3).hessians(), collected(hp, model)
    assert_same_hessians(found, expected)
    quantizable = {
        n
        for n in model.state_dict()
        if role_of(n) in ("matrix", "expert", "mu_matrix", "embedding")
    }
    assert set(found) == {name for name in quantizable if not name.endswith("expert_down")}
    for name, hessian in found.items():
        assert torch.allclose(hessian, hessian.mT, rtol=1e-5), name
        assert hessian.shape[-1] == sum(
            m.size(-1) for m in matrices_of(model.state_dict(), name)[0]
        )
        assert (hessian.diagonal(dim1=-2, dim2=-1) > 0).any(), name


def test_q_k_and_v_read_different_inputs_where_mu_is_added_to_these(folder):
    for mu in CHOICES["mu"].split():
        hp = data_hp(folder, mu=mu)
        hessians = collected(hp, make_model(hp))
        q, k, v = (hessians[f"blocks.1.attn.c_{part}.weight"] for part in "qkv")
        assert (
            torch.equal(q, k)
            == torch.equal(k, v)
            == torch.equal(q, v)
            == (mu not in ("vector", "pid"))
        )


DISPATCHED = [{}, {"mu": "lowrank", "activation": "swiglu"}, {"num_experts": 3}, {"top_k": 2}]


@pytest.mark.parametrize("mode", DISPATCHED, ids=label)
def test_both_dispatches_have_the_same_hessians(folder, mode):
    masked, grouped = (
        data_hp(folder, **mode, dispatch=dispatch) for dispatch in ("masked", "grouped")
    )
    assert_same_hessians(
        collected(grouped, make_model(grouped)), collected(masked, make_model(masked))
    )


@pytest.mark.parametrize("routing", ["zipf", "learned"])
def test_hidden_units_of_two_experts_never_meet(folder, routing):
    hp = data_hp(folder, gptq_batches=4, routing=routing)
    hessian = collected(hp, make_model(hp))["blocks.1.mlp.down.weight"]
    assert hessian.shape == (32 + 4 * 8, 32 + 4 * 8)
    shared, routed = hessian[:32, 32:], hessian[32:, 32:].view(4, 8, 4, 8)
    assert (shared != 0).all()
    for a, b in itertools.product(range(4), range(4)):
        assert (routed[a, :, b] != 0).all() if a == b else (routed[a, :, b] == 0).all()


def test_hidden_units_of_two_experts_of_a_token_meet(folder):
    hp = data_hp(folder, gptq_batches=4, top_k=2, routing_per_pass=False)
    model = make_model(hp)
    table, tokens = model.expert_table[1].long(), TokenLoader(hp, ALONE)
    pairs = {
        tuple(sorted(pair))
        for _ in range(4)
        for pair in table[tokens.next_batch()[0].flatten()].tolist()
    }
    routed = collected(hp, model)["blocks.1.mlp.down.weight"][32:, 32:].view(4, 8, 4, 8)
    met = {
        pair
        for pair in itertools.combinations(range(4), 2)
        if (routed[pair[0], :, pair[1]] != 0).all()
    }
    assert met == pairs
    assert met


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("routing", ["zipf", "cluster", *TABLE_SCORE])
def test_the_moments_of_the_experts_inputs_sum_to_those_of_all(folder, routing, top_k):
    hp = data_hp(folder, routing=routing, top_k=top_k)
    hessians, reach = collected(hp, make_model(hp)), hp.num_experts if routing == "soft" else top_k
    for layer in range(hp.num_layers):
        total, each = (
            hessians[f"blocks.{layer}.mlp.up.weight"],
            hessians[f"blocks.{layer}.mlp.expert_up"],
        )
        torch.testing.assert_close(each.sum(0), reach * total, rtol=1e-3, atol=1e-3)
        assert torch.allclose(each[0], each[1], rtol=0.1) == (
            routing == "soft"
        )  # where all tokens reach all experts


def test_an_expert_that_no_token_reaches_is_rounded_to_nearest(folder, tmp_path):
    hp = data_hp(folder, routing_per_pass=False, target_bytes=0, codec="zstd")
    model = make_model(hp)
    model.expert_table.zero_()
    state, hessians = {n: t.clone() for n, t in model.state_dict().items()}, collected(hp, model)
    near, parts, unusable = nearest_and_gptq(hp, state, hessians)
    assert unusable == []
    for layer in range(hp.num_layers):
        name = f"blocks.{layer}.mlp.expert_up"
        assert (hessians[name][1:] == 0).all()
        assert (hessians[name][0].diagonal() > 0).all()
        for tensor in (name, f"blocks.{layer}.mlp.expert_down"):
            same = [
                torch.equal(new, old)
                for new, old in zip(parts[tensor][0], near[tensor][0], strict=True)
            ]
            assert same == [False, True, True, True], tensor
    export(hp, ALONE, silent, model, hessians, SHA, tmp_path / "a.ptz")
    loaded = load_artifact(tmp_path / "a.ptz", hp, torch.device("cpu"))[0].state_dict()
    assert all(
        torch.equal(loaded[name], dequantize(*part))
        for name, part in parts.items()
        if len(part) > 1
    )


@pytest.mark.parametrize(
    "mode", [{}, {"routing": "learned", "top_k": 2, "mu": "pid"}, {"routing": "soft"}], ids=label
)
def test_real_hessians_lower_the_output_error_of_every_matrix(folder, mode):
    hp = data_hp(folder, gptq_batches=8, **mode)
    model = make_model(hp)
    hessians, state = collected(hp, model), model.state_dict()
    near, parts, unusable = nearest_and_gptq(hp, state, hessians)
    assert unusable == []
    restored = [
        {n: dequantize(*p) for n, p in some.items() if len(p) > 1} for some in (near, parts)
    ]
    for name, hessian in hessians.items():
        matrices = [matrices_of(tensors, name) for tensors in (state, *restored)]
        for H, exact, old, new in zip(
            hessian.view(-1, *hessian.shape[-2:]), *matrices, strict=True
        ):
            exact, old, new = (torch.cat(pieces, -1) for pieces in (exact, old, new))
            assert error_of(exact, new, H) < 0.9 * error_of(exact, old, H), name


def test_collecting_leaves_the_model_as_it_was(folder):
    hp = data_hp(folder)
    model = make_model(hp).train()
    before, ids = {n: t.clone() for n, t in model.state_dict().items()}, torch.arange(16)[None]
    hessians = collected(hp, model)
    assert not any(hessian.requires_grad for hessian in hessians.values())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(
        p.requires_grad and p.grad is None and p.device.type == "cpu" for p in model.parameters()
    )
    model(ids, ids).backward()


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_the_knob_bounds_the_tokens(folder, batches):
    hp, lines = (
        data_hp(
            folder, gptq_batches=batches, max_wallclock_seconds=0.0, gptq_reserve_seconds=0.001
        ),
        [],
    )
    model, loader = make_model(hp), TokenLoader(hp, ALONE)
    hessians, seconds = collect_hessians(hp, ALONE, lines.append, model, loader)
    assert 0 < seconds < 60
    assert loader.position * hp.train_seq_len == batches * 64
    assert_same_hessians(hessians, Observed(hp, model, batches).hessians())
    assert len(lines) == 1
    assert lines[0].startswith(
        f"gptq: {len(hessians)} Hessians over {batches * 64} training tokens in "
    )
    assert hessians["tok_emb.weight"].trace().item() == pytest.approx(
        batches * 64 * hp.model_dim, rel=1e-4
    )


@pytest.mark.parametrize(
    ("reserve", "batches"), [(0.5, 1), (1.5, 1), (2.5, 2), (5.5, 5), (20.0, 9)]
)
def test_the_reserve_ends_the_collection_before_it_is_over(folder, monkeypatch, reserve, batches):
    """A batch takes a second; 9 were asked for."""
    hp = data_hp(folder, gptq_batches=9, max_wallclock_seconds=100.0, gptq_reserve_seconds=reserve)
    model, loader, clock = make_model(hp), TokenLoader(hp, ALONE), itertools.count(1000)
    monkeypatch.setattr(train_gpt.Dist, "synchronize", lambda self: float(next(clock)))
    hessians, seconds = collect_hessians(hp, ALONE, silent, model, loader)
    assert seconds == batches + 1  # and one for the sum over ranks
    assert loader.position * hp.train_seq_len == batches * 64
    assert_same_hessians(hessians, Observed(hp, model, batches).hessians())


class OneOfTwo(Dist):
    """A rank of two whose collectives return what it brought."""

    def all_sum(self, tensor, op=None):
        return tensor


def test_two_ranks_see_together_what_one_sees_alone(folder):
    hp = data_hp(folder, micro_batch_tokens=16, gptq_batches=6)
    model, cpu = make_model(hp), torch.device("cpu")
    alone, first, second = (
        collected(hp, model, d) for d in (ALONE, OneOfTwo(0, 2, cpu), OneOfTwo(1, 2, cpu))
    )
    assert_same_hessians({name: hessian + second[name] for name, hessian in first.items()}, alone)
    assert first["tok_emb.weight"].trace().item() == pytest.approx(3 * 16 * hp.model_dim, rel=1e-4)
    assert not torch.allclose(first["tok_emb.weight"], second["tok_emb.weight"], rtol=0.1)


# ---- Export ----------------------------------------------------------------------------------------------------------


def export_lines(hp: Hyperparameters, model: GPT, hessians: dict, path: Path) -> list[str]:
    lines = []
    export(hp, ALONE, lambda text: lines.extend(text.splitlines()), model, hessians, SHA, path)
    return lines


def test_export_writes_what_gptq_made_and_leaves_the_model_alone(folder, tmp_path):
    hp = data_hp(folder, target_bytes=0, codec="zstd")
    model, path = make_model(hp), tmp_path / "a.ptz"
    state, hessians = {n: t.clone() for n, t in model.state_dict().items()}, collected(hp, model)
    hessians["blocks.0.attn.proj.weight"][0, 0] = math.nan
    lines = export_lines(hp, model, hessians, path)
    _, parts, _ = nearest_and_gptq(hp, state, hessians)
    loaded = load_artifact(path, hp, torch.device("cpu"))[0].state_dict()
    assert all(
        torch.equal(loaded[name], dequantize(*part))
        for name, part in parts.items()
        if len(part) > 1
    )
    assert any("blocks.0.attn.proj.weight" in line and line.startswith("warning") for line in lines)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert f"Total submission size quantized+zstd: {CODE + path.stat().st_size} bytes" in lines
    assert any(line.startswith("total ") for line in lines)


def test_export_without_hessians_leaves_the_model_alone(folder, tmp_path):
    hp = data_hp(folder, target_bytes=CODE + 8000, num_layers=2, codec="zstd")
    model, path = make_model(hp), tmp_path / "a.ptz"
    before = {n: t.clone() for n, t in model.state_dict().items()}
    lines = export_lines(hp, model, {}, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert 0.9 * 8000 < path.stat().st_size <= 8000
    assert not any("GPTQ" in line or "warning" in line for line in lines)
    with pytest.raises(Refusal, match=r"^TARGET_BYTES="):
        export_lines(replace(hp, target_bytes=1000), model, {}, tmp_path / "b.ptz")
    assert not (tmp_path / "b.ptz").exists()

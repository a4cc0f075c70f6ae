"""Properties of GPTQ and of the Hessians it gets.   pytest tests/test_gptq.py"""

import itertools
import math
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ALONE, make_model, tiny_hp, zipf_counts
from helpers_cli import write_shard
from helpers_hostile import SHA, refusal
from torch import Tensor

import train_gpt
from train_gpt import Dist, Hyperparameters, QuantizedTensor, TokenLoader, fit, quantize, role_of

CODE_BYTES = train_gpt.submission_bytes(Hyperparameters(), 0, "code")[0]


# ---- GPTQ ----------------------------------------------------------------------------------------


def moments(columns: int, seed: int = 0, samples: int = 2000) -> Tensor:
    """Return X^T X of inputs of unequal activity that share a few common causes."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(samples, max(columns // 4, 1), generator=generator)
    mixing = torch.randn(causes.shape[1], columns, generator=generator) / causes.shape[1] ** 0.5
    x = causes @ mixing + 0.3 * torch.randn(samples, columns, generator=generator)
    x = x * (0.5 * torch.randn(columns, generator=generator)).exp()
    return x.mT @ x


def matrix(rows: int, columns: int) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def scale_for(weight: Tensor, bits: int = 6, clip: float = 12.85) -> Tensor:
    return train_gpt.quantize_tensor(weight, bits, clip).scale().expand_as(weight)


def gptq(weight: Tensor, scale: Tensor, bits: int, hessian: Tensor) -> Tensor | None:
    limits = torch.full(weight.shape[-1:], 2 ** (bits - 1) - 1)
    return train_gpt.gptq(weight, scale, limits, hessian)


def plain_gptq(weight: Tensor, scale: Tensor, bits: int, hessian: Tensor) -> Tensor:
    """Follow the papers without blocks or factorizations, in float64.

    Round a column, move its error to the columns left (OBQ), and take it out of the inverse
    Hessian by Gaussian elimination.
    """
    H, w, s = (t.double().numpy().copy() for t in (hessian, weight, scale))
    order = np.argsort(-np.diag(H), kind="stable")
    inverse = np.linalg.inv(H + train_gpt.GPTQ_DAMPING * np.diag(H).mean() * np.eye(len(H)))
    symbols = np.zeros_like(w)
    levels = 2 ** (bits - 1) - 1
    for at, j in enumerate(order):
        symbols[:, j] = np.clip(np.round(w[:, j] / s[:, j]), -levels, levels)
        error = (w[:, j] - symbols[:, j] * s[:, j]) / inverse[j, j]
        left = order[at + 1 :]
        w[:, left] -= np.outer(error, inverse[j, left])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.from_numpy(symbols).float()


SIZES = [(1, 6, 12.85), (5, 3, 2.0), (128, 6, 12.85), (130, 3, 2.0), (300, 6, 12.85)]


@pytest.mark.parametrize(("columns", "bits", "clip"), SIZES)
def test_symbols_are_those_of_the_plain_algorithm(columns, bits, clip):
    weight = matrix(16, columns)
    hessian = moments(columns)
    by_row = scale_for(weight, bits, clip)
    codes = torch.randint(-4, 4, weight.shape, generator=torch.Generator().manual_seed(3))
    for scale in (by_row, by_row * torch.exp2(codes / 2)):  # one for every weight, too
        before = [t.clone() for t in (weight, scale, hessian)]
        symbols = gptq(weight, scale, bits, hessian)
        assert all(map(torch.equal, (weight, scale, hessian), before))
        same_rows = (symbols == plain_gptq(weight, scale, bits, hessian)).all(-1)
        assert same_rows.sum() >= 15  # a tie that rounds differently changes the rest of its row


@pytest.mark.parametrize("columns", [20, 300])
def test_inputs_that_are_independent_or_never_active_are_rounded_to_nearest(columns):
    weight = matrix(16, columns)
    hessian = moments(columns)
    scale = scale_for(weight)
    nearest = train_gpt.round_to_nearest(weight, scale, 31)
    assert torch.equal(gptq(weight, scale, 6, hessian.diagonal().diag()), nearest)
    assert torch.equal(gptq(weight, scale, 6, torch.zeros_like(hessian)), nearest)

    dead = torch.arange(columns) % 5 == 3
    hessian[dead] = 0
    hessian[:, dead] = 0
    symbols = gptq(weight, scale, 6, hessian)
    assert torch.equal(symbols[:, dead], nearest[:, dead])
    assert not torch.equal(symbols, nearest)
    other = weight.clone()
    other[:, dead] += 0.01
    assert torch.equal(gptq(other, scale, 6, hessian)[:, ~dead], symbols[:, ~dead])


def spoiled(kind: str, columns: int = 40) -> Tensor:
    """Return a Hessian that is of no use."""
    hessian = moments(columns)
    if kind == "negative":
        return -hessian
    if kind == "indefinite":
        hessian[3, 4] = hessian[4, 3] = 10 * hessian.diagonal().max()
    elif kind == "dead_but_correlated":
        hessian[3, 3] = 0.0
    else:
        hessian[3, 4] = hessian[4, 3] = float(kind)
    return hessian


@pytest.mark.parametrize("kind", ["nan", "inf", "negative", "indefinite", "dead_but_correlated"])
def test_a_tensor_whose_hessian_is_of_no_use_is_rounded_to_nearest_and_named(kind):
    weight = matrix(8, 40)
    assert gptq(weight, scale_for(weight), 6, spoiled(kind)) is None
    hp = tiny_hp()
    bad = "blocks.1.attn.c_k.weight"
    state = make_model(hp).state_dict()
    hessians = {name: moments(32) for name in ("blocks.0.attn.c_k.weight", "tok_emb.weight")}
    hessians[bad] = spoiled(kind, 32)
    nearest, _ = quantize(hp, state)
    stored, unusable = quantize(hp, state, hessians=hessians)
    assert unusable == [bad]
    assert changed(stored, nearest) == set(hessians) - {bad}


# ---- Quantizer -----------------------------------------------------------------------------------


def symbols_of(tensor: Tensor | QuantizedTensor) -> Tensor:
    return tensor.symbols if isinstance(tensor, QuantizedTensor) else tensor


def changed(stored: dict, other: dict) -> set[str]:
    """Return the tensors whose symbols differ."""
    names = stored.keys()
    return {n for n in names if not torch.equal(symbols_of(stored[n]), symbols_of(other[n]))}


def test_active_inputs_of_the_embedding_get_finer_scales_by_the_fourth_root():
    weight = matrix(64, 40)
    plain = train_gpt.column_scale_codes(None, weight)
    assert (train_gpt.decode_scales(plain) == 1).all()
    for hessian in (torch.full((40, 40), math.nan), torch.eye(40), torch.zeros(40, 40)):
        assert torch.equal(train_gpt.column_scale_codes(hessian, weight), plain)
    activity = torch.logspace(-2, 2, 40)
    factors = train_gpt.decode_scales(train_gpt.column_scale_codes(torch.diag(activity), weight))
    torch.testing.assert_close(factors, activity**-0.25, rtol=0.05, atol=0)
    extreme = torch.diag(torch.tensor([1e30, *[1.0] * 38, 0.0]))
    factors = train_gpt.decode_scales(train_gpt.column_scale_codes(extreme, weight))
    assert 1 / 16 <= factors.min() < factors.max() <= 8


def test_symbols_are_those_of_gptq_at_scales_that_only_the_embedding_has_by_column():
    hp = tiny_hp()
    state = make_model(hp).state_dict()
    hessians = {"tok_emb.weight": moments(32), "blocks.1.attn.c_k.weight": moments(32, 1)}
    stored, _ = quantize(hp, state, hessians=hessians)
    for name, hessian in hessians.items():
        bits, clip = train_gpt.bits_and_clip(hp, name)
        columns = train_gpt.column_scale_codes(hessian, state[name]) if "emb" in name else None
        scale = train_gpt.quantize_tensor(state[name], bits, clip, columns).scale()
        scale = scale.expand_as(state[name])
        assert torch.equal(stored[name].scale().expand_as(scale), scale)
        assert torch.equal(stored[name].symbols.float(), gptq(state[name], scale, bits, hessian))
    coarser, _ = quantize(hp, state, 2.0, hessians)
    for name in hessians:
        spread = stored[name].symbols.float().std()
        assert coarser[name].symbols.float().std() < 0.8 * spread


def test_experts_are_quantized_each_by_its_own_hessian_and_a_bad_one_spoils_no_other():
    hp = tiny_hp()
    name = "blocks.1.mlp.expert_up"
    state = make_model(hp).state_dict()
    hessian = torch.stack([moments(32), spoiled("nan", 32), moments(32, 1), torch.zeros(32, 32)])
    nearest, _ = quantize(hp, state)
    stored, unusable = quantize(hp, state, hessians={name: hessian})
    assert unusable == [name]
    for expert, weight in enumerate(state[name]):
        expected = nearest[name].symbols[expert].float()
        if expert in (0, 2):
            expected = gptq(weight, scale_for(weight), 6, hessian[expert])
            assert not torch.equal(expected, nearest[name].symbols[expert].float())
        assert torch.equal(stored[name].symbols[expert].float(), expected)


def test_fit_with_hessians_meets_the_target_as_well():
    sizes = {"vocab_size": 1024, "model_dim": 96, "rope_dims": 8, "shared_dim": 256}
    hp = tiny_hp(**sizes, num_layers=2, target_bytes=0)
    state = make_model(hp).state_dict()
    matrices = [name for name in state if role_of(name) == "matrix" and "mlp.down" not in name]
    hessians = {name: moments(state[name].size(-1)) for name in matrices}
    hessians["tok_emb.weight"] = torch.full((96, 96), math.nan)
    plain = fit(hp, state, SHA, hessians, fast=True)
    assert plain.unusable == ["tok_emb.weight"]
    target = int(0.9 * len(plain.artifact))
    fitted = fit(hp.override(target_bytes=CODE_BYTES + target), state, SHA, hessians, fast=True)
    assert 0.998 * target <= len(fitted.artifact) <= target
    assert changed(fitted.tensors, quantize(hp, state, fitted.factor)[0]) == set(matrices)


# ---- Hessians and export -------------------------------------------------------------------------

# Pairs of routings, mus, dispatches and the rest.
MODES = [
    {},
    {"mu": "full", "dispatch": "grouped", "activation": "swiglu"},
    {"mu": "pid", "dispatch": "grouped", "loop_passes": 3, "num_experts": 3},
    {"mu": "off", "routing": "hash", "dispatch": "grouped", "routing_per_pass": False},
    {"mu": "full", "routing": "modulo", "loop_passes": 1},
    {"mu": "pid", "routing": "learned", "activation": "swiglu"},
    {"mu": "full", "routing": "hybrid"},
    {"mu": "off", "routing": "soft"},
    {"mu": "vector", "routing": "dense", "activation": "swiglu"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One training shard of tokens by Zipf's law."""
    path = tmp_path_factory.mktemp("shards")
    shares = zipf_counts(64) / zipf_counts(64).sum()
    tokens = np.random.default_rng(0).choice(64, 2000, p=shares)
    write_shard(path / "fineweb_train_000000.bin", tokens)
    return path


def collected(hp: Hyperparameters, model: train_gpt.GPT, dist: Dist = ALONE) -> dict[str, Tensor]:
    return train_gpt.collect_hessians(hp, dist, print, model, TokenLoader(hp, dist))[0]


class Observed:
    """Moments of the explicit inputs of every matrix, on the loader's first batches."""

    def __init__(self, hp: Hyperparameters, model: train_gpt.GPT, batches: int):
        self.config = hp.model
        self.table = model.expert_table.long()
        self.sums = {}
        loader = TokenLoader(hp, ALONE)
        hooks = []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(partial(self.observe, name)))
        with torch.no_grad():
            for _ in range(batches):
                self.ids = loader.next_batch()[0]
                self.passes = Counter()
                self.add("tok_emb.weight", model.features(self.ids)[0])
        for hook in hooks:
            hook.remove()

    def add(self, name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.size(-1)).double()
        self.sums[name] = self.sums.get(name, 0) + x.T @ x

    def observe(self, name: str, module: torch.nn.Module, args: tuple) -> None:
        is_routed = ".mlp" in name and self.config.is_routed
        if is_routed and name.endswith(".mlp"):
            self.add_routed(name, module, args[0].flatten(0, 1))
        elif isinstance(module, train_gpt.CastedLinear) and not is_routed:
            self.add(f"{name}.weight", args[0])

    def add_routed(self, name: str, module: torch.nn.Module, x: Tensor) -> None:
        """Add the inputs of an MLP's shared and routed projections, x (N, D)."""
        layer = int(name.split(".")[1])
        shift = self.passes[layer] * self.config.routing_per_pass
        self.passes[layer] += 1
        expert = (self.table[layer][self.ids.flatten()] + shift) % self.config.num_experts
        factors = self.factors(module, x, F.one_hot(expert, self.config.num_experts).float())
        hidden = [train_gpt.activate(x @ module.up.weight.T, self.config.activation)]
        for e, factor in enumerate(factors.unbind(-1)):
            own = train_gpt.activate(x @ module.expert_up[e].T, self.config.activation)
            hidden.append(own * factor[:, None])
            self.add(f"{name}.expert_up.{e}", x[factor > 0])
        self.add(f"{name}.up.weight", x)
        self.add(f"{name}.down.weight", torch.cat(hidden, -1))

    def factors(self, module: torch.nn.Module, x: Tensor, named: Tensor) -> Tensor:
        """Return what each expert's units are multiplied by, (N, E), for the table's experts."""
        if not self.config.has_router:
            return named
        scores = x @ module.router.T + train_gpt.TABLE_SCORE[self.config.routing] * named
        if self.config.routing == "soft":
            return self.config.num_experts * scores.exp() / scores.exp().sum(-1, keepdim=True)
        return (scores == scores.amax(-1, keepdim=True)).float()

    def hessians(self) -> dict[str, Tensor]:
        found = {name: moments.float() for name, moments in self.sums.items()}
        for name in {name.rpartition(".")[0] for name in found if "expert_up" in name}:
            each = [found.pop(f"{name}.{e}") for e in range(self.config.num_experts)]
            found[name] = torch.stack(each)
        return found


def assert_same_hessians(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, hessian in expected.items():
        tolerance = 1e-4 * hessian.abs().max().item()
        torch.testing.assert_close(found[name], hessian, rtol=1e-3, atol=tolerance, msg=name)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_hessians_are_the_moments_of_the_inputs(folder, mode):
    hp = tiny_hp(data_path=str(folder), **mode, gptq_batches=3)
    model = make_model(hp).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = collected(hp, model)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

    assert_same_hessians(found, Observed(hp, model, 3).hessians())
    rounded = ("matrix", "expert", "mu_matrix", "embedding")
    names = {name for name in model.state_dict() if role_of(name) in rounded}
    assert set(found) == {name for name in names if not name.endswith("expert_down")}
    q, k, v = (found[f"blocks.1.attn.c_{part}.weight"] for part in "qkv")
    mu_is_added = hp.model.mu in ("vector", "pid")
    assert torch.equal(q, k) == torch.equal(k, v) == torch.equal(q, v) == (not mu_is_added)


def test_down_projections_of_a_layer_make_up_for_each_others_errors(folder):
    """Shared and routed hidden units add up to one output, so they are one matrix to GPTQ."""
    hp = tiny_hp(data_path=str(folder))
    model = make_model(hp)
    state = model.state_dict()
    shared, routed = "blocks.1.mlp.down.weight", "blocks.1.mlp.expert_down"
    state[routed][2, 0] = 0  # of zeros, it takes no error of the others
    hessian = collected(hp, model)[shared]
    nearest, _ = quantize(hp, state)
    stored, _ = quantize(hp, state, hessians={shared: hessian})
    assert changed(stored, nearest) == {shared, routed}
    parts = [state[shared], *state[routed]]
    scale = torch.cat([scale_for(part) for part in parts], -1)
    symbols = gptq(torch.cat(parts, -1), scale, 6, hessian)
    found = torch.cat([stored[shared].symbols, *stored[routed].symbols], -1)
    symbols[0, 32 + 2 * 8 : 32 + 3 * 8] = 0
    assert torch.equal(found.float(), symbols)


@pytest.mark.parametrize("mode", [{}, {"qat_from": 0.0}, {"matrix_bits": 3}], ids=str)
def test_each_part_of_a_down_projection_keeps_its_own_bits(mode):
    """Of different bits they are still one matrix, but for those that were trained rounded."""
    hp = tiny_hp(expert_bits=4, **mode)
    state = make_model(hp).state_dict()
    shared = "blocks.1.mlp.down.weight"
    routed = "blocks.1.mlp.expert_down"
    hessian = moments(64)
    nearest, _ = quantize(hp, state)
    stored, _ = quantize(hp, state, hessians={shared: hessian})
    assert stored[shared].symbols.abs().max() <= 2 ** (hp.matrix_bits - 1) - 1
    assert stored[routed].symbols.abs().max() == 7
    coarser, _ = quantize(hp, state, 2.0)
    assert (routed in changed(coarser, nearest)) == (not hp.uses_qat)
    if hp.uses_qat:
        assert changed(stored, nearest) == {shared}
        scale = stored[shared].scale().expand_as(state[shared])
        alone = gptq(state[shared], scale, 6, hessian[:32, :32])
        assert torch.equal(stored[shared].symbols.float(), alone)
    else:
        assert changed(stored, nearest) == {shared, routed}


@pytest.mark.parametrize(("cap", "batches"), [(0.0, 9), (8.0, 1), (10.0, 2), (80.0, 3), (300.0, 5)])
def test_the_knob_and_the_reserve_bound_the_tokens(folder, monkeypatch, cap, batches):
    """A batch takes a second; 9 are asked for, and without a cap, 2, 2.5, 4 and 6 s kept."""
    hp = tiny_hp(data_path=str(folder), gptq_batches=9, max_wallclock_seconds=cap)
    model = make_model(hp)
    loader = TokenLoader(hp, ALONE)
    clock = itertools.count(1000)
    monkeypatch.setattr(Dist, "synchronize", lambda self: float(next(clock)))
    lines = []
    hessians, seconds = train_gpt.collect_hessians(hp, ALONE, lines.append, model, loader)
    assert seconds == batches + 1  # and one for the sum over ranks
    assert loader.position * hp.model.train_seq_len == batches * 64
    (line,) = lines
    assert line.startswith(f"gptq: {len(hessians)} Hessians over {batches * 64} training tokens in")
    assert_same_hessians(hessians, Observed(hp, model, batches).hessians())


def test_two_ranks_see_together_what_one_sees_alone(folder, monkeypatch):
    """To each the other brings as much as it has itself."""
    hp = tiny_hp(data_path=str(folder), micro_batch_tokens=16, gptq_batches=6)
    model = make_model(hp)
    alone = collected(hp, model)
    monkeypatch.setattr(Dist, "all_sum", lambda self, x, op=None: x.mul_(2) if x.ndim > 1 else x)
    first, second = (collected(hp, model, Dist(rank, 2, ALONE.device)) for rank in (0, 1))
    assert_same_hessians({name: (first[name] + second[name]) / 2 for name in first}, alone)
    assert not torch.allclose(first["tok_emb.weight"], second["tok_emb.weight"], rtol=0.1)


def test_export_writes_what_gptq_made_and_leaves_the_model_alone(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hp = tiny_hp(data_path=str(folder), target_bytes=0, run_id="run")
    model = make_model(hp)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hessians = collected(hp, model)
    bad = "blocks.0.attn.proj.weight"
    hessians[bad][0, 0] = math.nan
    lines = []
    path = train_gpt.export(hp, ALONE, lines.append, model.state_dict(), hessians, SHA)
    stored, _ = quantize(hp, state, hessians=hessians)
    loaded = train_gpt.load_artifact(path, hp, ALONE.device)[0].state_dict()
    for name, tensor in stored.items():
        if isinstance(tensor, QuantizedTensor):
            assert torch.equal(loaded[name], tensor.dequantize()), name
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    log = "\n".join(lines)
    assert f"warning: the Hessian of {bad} is not finite" in log
    assert f"Total submission size quantized+auto: {CODE_BYTES + path.stat().st_size} bytes" in log

    small = hp.override(target_bytes=1000, run_id="small")
    message = refusal(train_gpt.export, small, ALONE, print, state, {}, SHA)
    assert message.startswith("TARGET_BYTES=1000: ")
    assert not path.with_name("small.ptz").exists()

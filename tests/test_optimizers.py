"""Muon, parameter groups, schedules, averaging, gradients and warm-up."""

import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE, make_ids, make_model, tiny_hp
from torch import Tensor

import train_gpt
from eval_sliding import same, snapshot
from train_gpt import GPT, Gradients, build_optimizers, lr_scale, rounded, train_step


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- Muon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 64), (256, 64), (32, 32)], ids=str)
def test_newton_schulz_keeps_singular_vectors_and_brings_the_values_close_to_one(shape):
    g = gaussian(8, *shape)
    z = train_gpt.zeropower_via_newtonschulz5(g)
    values = torch.linalg.svdvals(z)
    assert values.max() < 1.16
    assert values.median() > 0.95
    # A square Gaussian matrix has a few values near zero, which five steps cannot lift all the way.
    assert (values < 0.84).float().mean() <= (0.03 if shape[0] == shape[1] else 0.0)

    u, _, vh = torch.linalg.svd(g / g.norm(dim=-1, keepdim=True), full_matrices=False)
    core = u.mT @ z @ vh.mT
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    assert (core - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert diagonal.min() > 0


def muon_run(params: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """Return the parameters after one Muon step per entry of `gradients`."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = train_gpt.Muon(params, lr=0.1, weight_decay=0.1, dist=ALONE, compiles=False)
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    for step in gradients:
        for p, gradient in zip(params, step, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)], ids=str)
def test_muon_updates_an_expert_as_a_matrix_of_its_own(shape):
    stacked = gaussian(4, *shape)
    scales = torch.tensor([1.0, 1e-3, 10.0, 0.0])[:, None, None]
    gradients = [scales * gaussian(4, *shape, seed=seed) for seed in (1, 2, 3)]
    (together,) = muon_run([stacked], [[g] for g in gradients])
    for e in range(4):
        (alone,) = muon_run([stacked[e]], [[g[e]] for g in gradients])
        torch.testing.assert_close(together[e], alone, rtol=0, atol=1e-6)
    # The last had no gradient: its zero update leaves weight decay alone.
    torch.testing.assert_close(together[3], 0.99**3 * stacked[3])


def test_muon_step_is_decay_then_the_orthogonalised_nesterov_momentum():
    start, g1, g2 = gaussian(24, 8), gaussian(24, 8, seed=1), gaussian(24, 8, seed=2)
    expected = start.clone()
    buffer = torch.zeros_like(start)
    for g in (g1, g2):
        buffer = 0.9 * buffer + 0.1 * g
        update = train_gpt.zeropower_via_newtonschulz5((0.1 * g + 0.9 * buffer)[None])[0]
        expected = expected * (1 - 0.1 * 0.1) - 0.1 * math.sqrt(24 / 8) * update
    torch.testing.assert_close(muon_run([start], [[g1], [g2]])[0], expected, rtol=0, atol=1e-5)


# ---- Parameter groups and schedules --------------------------------------------------------------


@pytest.mark.parametrize(("routing", "mu"), [("zipf", "pid"), ("learned", "full")])
def test_every_parameter_has_one_group_with_the_rates_of_its_role(routing, mu):
    hp = tiny_hp(routing=routing, mu=mu)
    model = GPT(hp.model)
    muon, adamw = build_optimizers(hp, model, ALONE)
    group_of = {id(p): group for group in muon.param_groups for p in group["params"]}
    group_of |= {id(p): group for group in adamw.param_groups for p in group["params"]}
    sizes = [len(group["params"]) for group in muon.param_groups + adamw.param_groups]
    assert sum(sizes) == len(group_of) == len(list(model.parameters()))

    matrices = hp.muon_weight_decay, hp.matrix_lr
    rates = {"matrix": matrices, "expert": matrices}
    rates["embedding"] = hp.embed_weight_decay, hp.embed_lr
    for name, p in model.named_parameters():
        role, group = train_gpt.role_of(name), group_of[id(p)]
        assert ("betas" in group) == (role not in ("matrix", "expert")), name
        expected = rates.get(role, (0.0, hp.scalar_lr))
        assert (group["weight_decay"], group["lr"]) == expected, name


@pytest.mark.parametrize(
    ("knobs", "restart"),
    [({"loop_passes": 1}, 1 / 3), ({"loop_from": 0.0}, 1 / 3), ({"loop_from": 0.6}, 0.6)],
    ids=str,
)
def test_sgdr_falls_to_the_floor_twice_and_restarts_where_the_recurrence_begins(knobs, restart):
    hp = tiny_hp(schedule="sgdr", min_lr=0.1, **knobs)
    fracs = (0, restart / 2, restart - 1e-6, restart, (1 + restart) / 2, 1, 1.2)
    scales = [lr_scale(hp, frac) for frac in fracs]
    assert scales == pytest.approx([1.0, 0.55, 0.1, 0.7, 0.4, 0.1, 0.1], abs=1e-4)
    assert lr_scale(hp.override(min_lr=0.8), restart) == 0.8


def test_linear_schedule_is_constant_and_then_linear_to_the_floor():
    hp = tiny_hp(schedule="linear", warmdown_frac=0.25, min_lr=0.1)
    scales = [lr_scale(hp, frac) for frac in (0.0, 0.75, 0.8, 0.875, 0.975, 0.99, 1.1)]
    assert scales == pytest.approx([1.0, 1.0, 0.8, 0.5, 0.1, 0.1, 0.1])
    assert lr_scale(hp.override(warmdown_frac=0.0), 1.0) == 1.0


def test_schedules_scale_every_group_and_ramp_muons_momentum():
    hp = tiny_hp(muon_momentum=0.97)
    muon, adamw = build_optimizers(hp, GPT(hp.model), ALONE)
    for frac, momentum in ((0.0, 0.85), (0.05, 0.91), (0.1, 0.97), (1.0, 0.97)):
        scale = train_gpt.set_schedules(hp, [muon, adamw], frac)
        assert scale == lr_scale(hp, frac)
        for group in muon.param_groups:
            assert group["momentum"] == pytest.approx(momentum)
        for group in muon.param_groups + adamw.param_groups:
            assert group["lr"] == pytest.approx(group["base_lr"] * scale)
    train_gpt.set_schedules(hp.override(muon_momentum=0.5), [muon], 0.0)
    assert muon.param_groups[0]["momentum"] == 0.5


# ---- Averaging -----------------------------------------------------------------------------------


def shares_of(hp: train_gpt.Hyperparameters, steps: int) -> list[float]:
    """Return the share of the start and of the weights after each of `steps` in the average."""
    shares = [1.0]
    count = 0
    for step in range(steps):
        newest = train_gpt.average_weight(hp, step / steps, count)
        shares = [share * (1 - newest) for share in shares] + [newest]
        count += newest > 0
    return shares


def test_ema_follows_the_newest_weights_and_forgets_the_start():
    hp = tiny_hp(average="ema", ema_decay=0.9965)
    assert sum(shares_of(hp, 5000)[-100:]) == pytest.approx(1 - 0.9965**100)
    assert sum(shares_of(hp, 1000)[-100:]) > 0.55  # the warm-up shortens the memory
    assert shares_of(hp, 30)[0] < 1e-7


@pytest.mark.parametrize(
    ("knobs", "first"),
    [({"schedule": "sgdr"}, 0.85), ({"schedule": "linear", "warmdown_frac": 0.1}, 0.9)],
)
def test_swa_weighs_the_end_of_the_last_descent_equally_and_no_other_steps(knobs, first):
    shares = shares_of(tiny_hp(average="swa", **knobs), 1000)
    start = round(1000 * first) + 1
    assert shares[:start] == [0.0] * start
    assert shares[start:] == pytest.approx([1 / (1001 - start)] * (1001 - start))


@pytest.mark.parametrize("average", ["ema", "swa", "off"])
def test_training_leaves_the_average_in_the_model_and_once(monkeypatch, average):
    """Step i fills all weights with i^2."""
    hp = tiny_hp(average=average, iterations=40, num_layers=1)
    model = make_model(hp)
    start = model.tok_emb.weight.detach().clone()
    steps = itertools.count()

    @torch.no_grad()
    def step(*args) -> Tensor:
        square = float(next(steps) ** 2)
        for p in model.parameters():
            p.fill_(square)
        return torch.tensor(1.0)

    monkeypatch.setattr(train_gpt, "train_step", step)
    loader = SimpleNamespace(
        next_batch=lambda: None, hp=hp, dist=ALONE, num_sequences=4, num_windows=9
    )
    train_gpt.train(hp, ALONE, lambda line: None, model, loader, None)
    first, *shares = shares_of(hp, 40)
    expected = first * start + sum(i**2 * share for i, share in enumerate(shares))
    if average == "off":
        expected = torch.full_like(start, 39.0**2)
    torch.testing.assert_close(model.tok_emb.weight.detach(), expected, rtol=1e-5, atol=0)


# ---- Gradients and warm-up -----------------------------------------------------------------------


def batch_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize(("parts", "max_norm"), [(1, 0.0), (4, 0.0), (2, 1e6), (2, 0.05)])
def test_micro_batches_are_one_large_batch_whose_gradients_are_clipped(parts, max_norm):
    hp = tiny_hp()
    ids = make_ids(hp, 4, 17)
    model = make_model(hp)
    loss = model(*batch_of(ids))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    if max_norm == 0.05:
        norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
        assert norm > 0.1
        expected = [gradient * max_norm / norm for gradient in expected]

    gradients = Gradients(model, ALONE)
    gradients.flat.fill_(5.0)  # of the step before
    batches = [batch_of(rows) for rows in ids.chunk(parts)]
    accumulated = train_step(model, [], gradients, batches, max_norm)
    torch.testing.assert_close(accumulated, loss.detach(), rtol=1e-5, atol=0)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("routing", ["zipf", "learned"])
def test_training_on_rounded_weights_is_straight_through(routing):
    hp = tiny_hp(routing=routing, matrix_bits=2, expert_bits=2, embed_bits=3, qat_from=0.0)
    assert hp.override(expert_bits=6).uses_gptq
    assert not hp.override(expert_bits=6, routing="dense").uses_gptq  # which has no experts
    model = make_model(hp)
    batch = batch_of(make_ids(hp, 4, 17))
    before = [p.detach().clone() for p in model.parameters()]
    stored, _ = train_gpt.quantize(hp, model.state_dict())
    for name, tensor in stored.items():
        if isinstance(tensor, train_gpt.QuantizedTensor):
            stored[name] = tensor.dequantize()
    exported = make_model(hp)
    exported.load_state_dict(stored)
    loss = exported(*batch)
    expected = torch.autograd.grad(loss, list(exported.parameters()))

    gradients = Gradients(model, ALONE)
    at_rounded = train_step(model, [], gradients, [batch], 0.0, True, rounded(hp, model))
    assert at_rounded == loss
    for p, kept, gradient in zip(model.parameters(), before, expected, strict=True):
        assert torch.equal(p, kept)
        assert torch.equal(p.grad, gradient)
    assert train_step(model, [], gradients, [batch], 0.0) != loss  # control: not rounded
    with contextlib.suppress(KeyboardInterrupt), rounded(hp, model):
        assert not all(map(torch.equal, model.parameters(), before))
        raise KeyboardInterrupt
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(("loop_from", "graphs"), [(0.5, [False, True]), (0.0, [True])])
def test_warm_up_runs_every_graph_that_training_will_run_and_leaves_no_trace(loop_from, graphs):
    hp = tiny_hp(loop_from=loop_from)
    loader = SimpleNamespace(hp=hp, dist=ALONE, num_sequences=4)
    model = make_model(hp)
    start = snapshot(model)
    optimizers = build_optimizers(hp, model, ALONE)
    seen = []

    def forward(*batch: Tensor, looped: bool) -> Tensor:
        seen.append(looped)
        return model(*batch, looped=looped)

    train_gpt.warm_up(forward, model, optimizers, Gradients(model, ALONE), loader)
    assert seen == [looped for looped in graphs for _ in range(train_gpt.WARMUP_STEPS)]
    assert [optimizer.state_dict()["state"] for optimizer in optimizers] == [{}, {}]
    assert same(start, model.state_dict())

"""Muon, parameter groups, schedules, averaging, gradients and warm-up."""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ALONE, make_ids, make_model, tiny_hp
from torch import Tensor

import train_gpt
from train_gpt import (
    GPT,
    WARMUP_STEPS,
    Dist,
    Gradients,
    Hyperparameters,
    Muon,
    QuantizedTensor,
    Role,
    average_weight,
    build_optimizers,
    lr_scale,
    quantize,
    role_of,
    rounded,
    set_schedules,
    train,
    train_step,
    warm_up,
    zeropower_via_newtonschulz5,
)

SHAPES = [(64, 16), (16, 64), (256, 64), (32, 32)]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- Muon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_keeps_singular_vectors_and_brings_the_values_close_to_one(shape):
    g = gaussian(8, *shape)
    z = zeropower_via_newtonschulz5(g)
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


def muon_run(
    params: list[Tensor], gradients: list[list[Tensor]], dist: Dist = ALONE
) -> list[Tensor]:
    """The parameters after one Muon step per entry of `gradients`."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = Muon(params, lr=0.1, weight_decay=0.1, dist=dist, compiles=False)
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
        update = zeropower_via_newtonschulz5((0.1 * g + 0.9 * buffer)[None])[0]
        expected = expected * (1 - 0.1 * 0.1) - 0.1 * math.sqrt(24 / 8) * update
    torch.testing.assert_close(muon_run([start], [[g1], [g2]])[0], expected, rtol=0, atol=1e-5)


class DeafDist(Dist):
    """A rank that never hears of the others."""

    def all_sum(self, tensor: Tensor) -> Tensor:
        return tensor


def test_ranks_share_the_matrices_of_a_group_and_their_updates_add_up():
    """Of two matrices on three ranks, the last has none."""
    params = [gaussian(16, 8), gaussian(16, 8, seed=1)]
    gradients = [[gaussian(16, 8, seed=2), gaussian(16, 8, seed=3)]]
    for i, expected in enumerate(muon_run(params, gradients)):
        decayed = 0.99 * params[i]
        updates = []
        for rank in range(3):
            dist = DeafDist(rank, 3, ALONE.device)
            updates.append(muon_run(params, gradients, dist)[i] - decayed)
        torch.testing.assert_close(decayed + sum(updates), expected, rtol=0, atol=1e-6)
        assert [bool(update.abs().max() > 0.01) for update in updates] == [i == 0, i == 1, False]


# ---- Parameter groups ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("routing", "mu"), [("zipf", "vector"), ("learned", "full"), ("dense", "pid"), ("soft", "off")]
)
def test_every_parameter_has_one_group_and_the_optimizer_of_its_role(routing, mu):
    hp = tiny_hp(routing=routing, mu=mu)
    model = GPT(hp.model)
    muon, adamw = build_optimizers(hp, model, ALONE)
    group_of = {}
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in group_of
                group_of[id(p)] = optimizer, group
    assert set(group_of) == set(map(id, model.parameters()))

    for name, p in model.named_parameters():
        optimizer, group = group_of[id(p)]
        role = role_of(name)
        assert (optimizer is muon) == (role in ("matrix", "expert")), name
        expected = 0.0, hp.scalar_lr
        if optimizer is muon:
            expected = hp.muon_weight_decay, hp.matrix_lr
        elif role == "embedding":
            expected = hp.embed_weight_decay, hp.embed_lr
        assert (group["weight_decay"], group["lr"]) == expected, name
        assert group["base_lr"] == group["lr"]


def test_a_parameter_without_a_role_or_without_an_optimizer_is_refused(monkeypatch):
    for name in ("trigram.weight", "blocks.3.attn.c_q.bias", "tok_emb.weight.extra"):
        with pytest.raises(AssertionError, match=name):
            role_of(name)

    hp = tiny_hp()
    model = GPT(hp.model)
    build_optimizers(hp, model, ALONE)
    model.orphan = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="orphan"):
        build_optimizers(hp, model, ALONE)

    twice = Role("orphan", "orphan", "adamw", "int8")
    monkeypatch.setattr(train_gpt, "ROLES", (*train_gpt.ROLES, twice))
    build_optimizers(hp, model, ALONE)
    model.again = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="again"):
        build_optimizers(hp, model, ALONE)


# ---- Schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "restart"),
    [
        ({"loop_passes": 1}, 1 / 3),
        ({"loop_from": 0.0}, 1 / 3),
        ({"loop_from": 0.35}, 0.35),
        ({"loop_from": 0.6, "min_lr": 0.0}, 0.6),
        ({"loop_from": 0.5, "min_lr": 0.8}, 0.5),
    ],
    ids=str,
)
def test_sgdr_falls_to_the_floor_twice_and_restarts_where_the_recurrence_begins(knobs, restart):
    hp = tiny_hp(schedule="sgdr", **knobs)
    peak = max(0.7, hp.min_lr)
    assert lr_scale(hp, 0.0) == pytest.approx(1.0)
    assert lr_scale(hp, restart) == pytest.approx(peak)
    assert lr_scale(hp, restart / 2) == pytest.approx((1 + hp.min_lr) / 2)
    assert lr_scale(hp, (1 + restart) / 2) == pytest.approx((peak + hp.min_lr) / 2)
    assert lr_scale(hp, restart - 1e-6) == pytest.approx(hp.min_lr, abs=1e-4)
    assert lr_scale(hp, 1.0) == lr_scale(hp, 1.2) == pytest.approx(hp.min_lr)
    for start, end in ((0.0, restart - 1e-6), (restart, 1.0)):
        scales = [lr_scale(hp, frac) for frac in np.linspace(start, end, 100)]
        assert all(a >= b for a, b in itertools.pairwise(scales))


@pytest.mark.parametrize("warmdown", [0.25, 0.85, 1.0])
def test_linear_schedule_is_constant_and_then_linear_to_the_floor(warmdown):
    hp = tiny_hp(schedule="linear", warmdown_frac=warmdown, min_lr=0.1)
    for frac in np.linspace(0, 1 - warmdown, 9):
        assert lr_scale(hp, frac) == pytest.approx(1.0)
    for left in np.linspace(1, 0.1, 9):
        assert lr_scale(hp, 1 - left * warmdown) == pytest.approx(left)
    assert lr_scale(hp, 1 - 0.05 * warmdown) == lr_scale(hp, 1.1) == 0.1
    assert lr_scale(hp.override(warmdown_frac=0.0), 1.0) == 1.0


def test_schedules_scale_every_group_and_ramp_muons_momentum():
    hp = tiny_hp(muon_momentum=0.97)
    muon, adamw = build_optimizers(hp, GPT(hp.model), ALONE)
    for frac, momentum in ((0.0, 0.85), (0.05, 0.91), (0.1, 0.97), (1.0, 0.97)):
        scale = set_schedules(hp, [muon, adamw], frac)
        assert scale == lr_scale(hp, frac)
        for group in muon.param_groups:
            assert group["momentum"] == pytest.approx(momentum)
        for group in muon.param_groups + adamw.param_groups:
            assert group["lr"] == pytest.approx(group["base_lr"] * scale)
    set_schedules(hp.override(muon_momentum=0.5), [muon], 0.0)
    assert muon.param_groups[0]["momentum"] == 0.5


class Rig:
    """`train` on a tiny model with a fake clock: step i fills all weights with `value(i)`."""

    def __init__(
        self, monkeypatch, hp: Hyperparameters, seconds: Iterable, value: Callable = float
    ):
        self.hp = hp
        self.model = make_model(hp)
        self.seconds = iter(seconds)  # that each step takes
        self.value = value
        self.now = 0.0
        self.lrs = []
        self.looped = []
        self.lines = []
        monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(train_gpt, "train_step", self.step)

    @torch.no_grad()
    def step(self, forward, optimizers, gradients, batches, max_norm, looped, weights) -> Tensor:
        self.now += next(self.seconds)
        for p in self.model.parameters():
            p.fill_(self.value(len(self.lrs)))
        self.looped.append(looped)
        self.lrs.append(optimizers[0].param_groups[0]["lr"] / self.hp.matrix_lr)
        return torch.tensor(1.0)

    def train(self) -> tuple[int, float]:
        """Steps and seconds."""
        loader = SimpleNamespace(
            next_batch=lambda: None, hp=self.hp, dist=ALONE, num_sequences=4, num_windows=9
        )
        end, _ = train(self.hp, ALONE, self.lines.append, self.model, loader, None)
        return end.step, end.elapsed

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize("loop_from", [0.0, 0.35, 0.9])
def test_a_timed_run_meets_the_restart_with_the_recurrence_and_the_floor(monkeypatch, loop_from):
    """Whatever its steps take; fractions are of what the Hessians leave of the cap."""
    hp = tiny_hp(max_wallclock_seconds=600.0, iterations=20_000, average="off", loop_from=loop_from)
    rng = np.random.default_rng(0)
    rig = Rig(monkeypatch, hp, iter(lambda: float(rng.choice([0.3, 0.6, 0.6, 0.9, 2.0])), None))
    steps, seconds = rig.train()
    assert steps == len(rig.lrs)
    budget = 600 - 12  # 2 % for the Hessians
    assert budget - 5 < seconds <= budget + 2
    assert rig.lrs[0] == pytest.approx(1.0)
    assert rig.lrs[-1] == pytest.approx(hp.min_lr, abs=0.02)

    (restart,) = [i for i in range(1, steps) if rig.lrs[i] > rig.lrs[i - 1] + 0.1]
    assert rig.lrs[restart - 1] == pytest.approx(hp.min_lr, abs=0.01)
    assert rig.lrs[restart] == pytest.approx(0.7, abs=0.01)
    switch = rig.looped.index(True)
    assert rig.looped == [False] * switch + [True] * (steps - switch)
    announced = [line for line in rig.lines if line.startswith("layer_loop:enabled")]
    if loop_from == 0:
        assert switch == 0
        assert not announced
    else:
        assert switch == restart == pytest.approx(loop_from * steps, rel=0.1)
        assert f"step:{switch} " in announced[0]
        assert "[0, 1, 2, 1, 2, 3]" in announced[0]


# ---- Averaging -----------------------------------------------------------------------------------


def effective_weights(hp: Hyperparameters, steps: int) -> list[float]:
    """Share of the start and of the parameters after each of `steps` steps in the average."""
    shares = [1.0]
    count = 0
    for step in range(steps):
        newest = average_weight(hp, step / steps, count)
        shares = [share * (1 - newest) for share in shares] + [newest]
        count += newest > 0
    return shares


def test_ema_follows_the_newest_weights_and_forgets_the_start():
    hp = tiny_hp(average="ema", ema_decay=0.9965)
    shares = effective_weights(hp, 5000)
    assert sum(shares) == pytest.approx(1.0)
    assert sum(shares[-100:]) == pytest.approx(1 - 0.9965**100)
    assert sum(effective_weights(hp, 1000)[-100:]) > 0.55  # the warm-up shortens the memory
    assert effective_weights(hp, 30)[0] < 1e-7


@pytest.mark.parametrize(
    ("knobs", "first"),
    [({"schedule": "sgdr"}, 0.85), ({"schedule": "linear", "warmdown_frac": 0.1}, 0.9)],
)
def test_swa_weighs_the_end_of_the_last_descent_equally_and_no_other_steps(knobs, first):
    shares = effective_weights(tiny_hp(average="swa", **knobs), 1000)
    start = round(1000 * first) + 1
    assert shares[:start] == [0.0] * start
    assert shares[start:] == pytest.approx([1 / (1001 - start)] * (1001 - start))


@pytest.mark.parametrize("average", ["ema", "swa", "off"])
def test_training_leaves_the_average_in_the_model_and_once(monkeypatch, average):
    hp = tiny_hp(average=average, iterations=40, num_layers=1)
    rig = Rig(monkeypatch, hp, itertools.repeat(1.0), value=lambda step: float(step**2))
    start = rig.weights()
    assert rig.train() == (40, 40.0)
    squares = [float(step**2) for step in range(40)]
    shares = effective_weights(hp, 40)
    averages = {
        "ema": start * shares[0]
        + sum(x * share for x, share in zip(squares, shares[1:], strict=True)),
        "swa": torch.full_like(start, np.mean(squares[34:])),
        "off": torch.full_like(start, squares[-1]),
    }
    torch.testing.assert_close(rig.weights(), averages[average], rtol=1e-5, atol=0)


# ---- Gradients and warm-up -----------------------------------------------------------------------


def batch_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("dispatch", ["masked", "grouped"])
def test_gradients_are_views_of_the_flat_buffer_and_stay_so(dispatch):
    hp = tiny_hp(dispatch=dispatch)
    model = make_model(hp)
    gradients = Gradients(model, ALONE)
    optimizers = build_optimizers(hp, model, ALONE)
    for _ in range(2):
        train_step(model, optimizers, gradients, [batch_of(make_ids(hp, 4, 17))] * 2, max_norm=0.3)
        spans = sorted((p.grad.data_ptr(), 4 * p.numel()) for p in model.parameters())
        begin = gradients.flat.data_ptr()
        assert begin + 256 <= spans[0][0]
        assert sum(spans[-1]) <= begin + 4 * gradients.flat.numel()
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(spans))
        assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_accumulated_micro_batches_are_one_large_batch_and_start_from_zero_gradients():
    hp = tiny_hp()
    ids = make_ids(hp, 4, 17)
    model = make_model(hp)
    loss = model(*batch_of(ids)).detach()
    gradients = Gradients(model, ALONE)
    results = []
    for parts in (1, 2, 4):
        gradients.flat.fill_(5.0)
        batches = [batch_of(rows) for rows in ids.chunk(parts)]
        accumulated = train_step(model, [], gradients, batches, max_norm=0.0)
        torch.testing.assert_close(accumulated, loss, rtol=1e-5, atol=0)
        results.append(gradients.flat[64:].clone())
    expected = torch.autograd.grad(model(*batch_of(ids)), list(model.parameters()))
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)
    for accumulated in results[1:]:
        assert (accumulated - results[0]).norm() < 1e-4 * results[0].norm()


ROUNDED = {"matrix_bits": 2, "expert_bits": 2, "embed_bits": 3, "qat_from": 0.0}


@pytest.mark.parametrize("routing", ["zipf", "learned", "dense"])
def test_training_on_rounded_weights_is_straight_through(routing):
    hp = tiny_hp(routing=routing, **ROUNDED)
    model = make_model(hp)
    batch = batch_of(make_ids(hp, 4, 17))
    before = [p.detach().clone() for p in model.parameters()]
    stored, _ = quantize(hp, model.state_dict())
    exported = make_model(hp)
    exported.load_state_dict(
        {n: t.dequantize() if isinstance(t, QuantizedTensor) else t for n, t in stored.items()}
    )
    loss = exported(*batch)
    expected = torch.autograd.grad(loss, list(exported.parameters()))

    gradients = Gradients(model, ALONE)
    at_rounded = train_step(model, [], gradients, [batch], 0.0, True, rounded(hp, model))
    assert at_rounded == loss
    for p, kept, gradient in zip(model.parameters(), before, expected, strict=True):
        assert torch.equal(p, kept)
        assert torch.equal(p.grad, gradient)
    assert train_step(model, [], gradients, [batch], 0.0) != loss  # control: not rounded
    assert any(not torch.equal(p, q) for p, q in zip(before, exported.parameters(), strict=True))


def test_the_weights_come_back_when_a_step_on_rounded_ones_fails():
    hp = tiny_hp(**ROUNDED)
    model = make_model(hp)
    before = copy.deepcopy(model.state_dict())
    with contextlib.suppress(KeyboardInterrupt), rounded(hp, model):
        assert not torch.equal(model.tok_emb.weight, before["tok_emb.weight"])
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_clipping_bounds_the_norm_keeps_the_direction_and_spares_small_gradients_and_the_loss():
    hp = tiny_hp()
    model = make_model(hp)
    gradients = Gradients(model, ALONE)
    flats = {}
    for max_norm in (0.0, 0.05, 1e6):
        train_step(model, [], gradients, [batch_of(make_ids(hp, 4, 17))], max_norm)
        flats[max_norm] = gradients.flat.clone()
    free, clipped = flats[0.0], flats[0.05]
    assert free[64:].norm() > 0.1
    assert 0.0499 < clipped[64:].norm() <= 0.05
    direction = free[64:] / free[64:].norm()
    torch.testing.assert_close(clipped[64:] / 0.05, direction, rtol=1e-4, atol=1e-6)
    assert torch.equal(flats[1e6], free)
    assert clipped[0] == free[0] > 1


def test_gradients_whose_squares_overflow_end_a_run_instead_of_becoming_zero():
    hp = tiny_hp()
    gradients = Gradients(make_model(hp), ALONE)
    gradients.flat[100] = 1e30
    gradients.average_and_clip(1.0)
    assert gradients.flat[64:].isnan().all()
    update = zeropower_via_newtonschulz5(torch.full((1, 4, 8), 1e30))
    assert update.isnan().all()
    assert zeropower_via_newtonschulz5(torch.full((1, 4, 8), 1e15)).isfinite().all()


@pytest.mark.parametrize(
    ("passes", "loop_from", "graphs"),
    [(1, 0.5, [True]), (2, 0.5, [False, True]), (2, 0.0, [True])],
)
def test_warm_up_runs_every_graph_that_training_will_run_and_leaves_no_trace(
    passes, loop_from, graphs
):
    hp = tiny_hp(loop_passes=passes, loop_from=loop_from)
    loader = SimpleNamespace(hp=hp, dist=ALONE, num_sequences=4)
    results = []
    for warms_up in (False, True):
        model = make_model(hp)
        start = copy.deepcopy(model.state_dict())
        optimizers = build_optimizers(hp, model, ALONE)
        gradients = Gradients(model, ALONE)
        seen = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["looped"]), with_kwargs=True
        )
        if warms_up:
            warm_up(model, model, optimizers, gradients, loader)
            assert seen == [looped for looped in graphs for _ in range(WARMUP_STEPS)]
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, start[name]), name
        for seed in range(2):
            batch = batch_of(make_ids(hp, 4, 17, seed))
            train_step(model, optimizers, gradients, [batch], hp.grad_clip_norm)
        results.append(model.state_dict())
        assert not torch.equal(model.state_dict()["tok_emb.weight"], start["tok_emb.weight"])
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor), name

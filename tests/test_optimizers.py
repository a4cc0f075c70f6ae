"""Properties of Muon, parameter groups, schedules, averaging and gradients.   pytest tests/test_optimizers.py"""

import copy
import itertools
import math
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ALONE, make_ids, make_model, tiny_hp

import train_gpt
from train_gpt import (
    CHOICES,
    GPT,
    Dist,
    Gradients,
    Hyperparameters,
    Muon,
    average_weight,
    build_optimizers,
    lr_scale,
    role_of,
    set_schedules,
    sgdr_bounds,
    train,
    train_step,
    warm_up,
    zeropower_via_newtonschulz5,
)

ROUTING, DISPATCH, MU = (CHOICES[knob].split() for knob in ("routing", "dispatch", "mu"))
SHAPES = [(64, 16), (16, 64), (256, 64), (32, 32), (128, 128)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_brings_singular_values_into_a_band_around_one(shape):
    g = gaussian(8, *shape)
    values = torch.linalg.svdvals(zeropower_via_newtonschulz5(g))
    assert values.max() < 1.16
    assert values.median() > 0.95
    # A square Gaussian matrix has a few singular values near zero, which five steps cannot lift all the way.
    assert (values < 0.84).float().mean() <= (0.03 if shape[0] == shape[1] else 0.0)
    assert torch.linalg.svdvals(g / g.norm(dim=(1, 2), keepdim=True)).max() < 0.6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_keeps_the_singular_vectors(shape):
    g = gaussian(4, *shape)
    u, _, vh = torch.linalg.svd(g / g.norm(dim=-1, keepdim=True), full_matrices=False)
    core = u.mT @ zeropower_via_newtonschulz5(g) @ vh.mT
    off_diagonal = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-3
    assert core.diagonal(dim1=-2, dim2=-1).min() > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_treats_every_matrix_by_itself_whatever_its_scale(shape):
    g = gaussian(5, *shape) * torch.tensor([1e-4, 1.0, 1e4, 1.0, 1.0])[:, None, None]
    batch = zeropower_via_newtonschulz5(g)
    for one, expected in zip(g, batch, strict=True):
        torch.testing.assert_close(
            zeropower_via_newtonschulz5(one[None])[0], expected, rtol=0, atol=1e-6
        )
    assert (batch[1] - batch[3]).abs().max() > 1e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_leaves_a_zero_matrix_zero(shape):
    g = torch.stack([torch.zeros(shape), gaussian(*shape)])
    z = zeropower_via_newtonschulz5(g)
    assert torch.equal(z[0], torch.zeros(shape))
    assert z[1].abs().max() > 0.01


def muon_run(params: list, gradients: list[list], dist=ALONE) -> list[torch.Tensor]:
    """The parameters after one Muon step per entry of `gradients`."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = Muon(params, lr=0.1, weight_decay=0.1, dist=dist, compiles=False)
    for step in gradients:
        for p, gradient in zip(params, step, strict=True):
            p.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["momentum"] = 0.9
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)], ids=str)
def test_muon_updates_an_expert_as_a_matrix_of_its_own(shape):
    stacked = gaussian(4, *shape)
    gradients = [
        gaussian(4, *shape, seed=s) * torch.tensor([1.0, 1e-3, 10.0, 1.0])[:, None, None]
        for s in (1, 2, 3)
    ]
    together = muon_run([stacked], [[g] for g in gradients])[0]
    separate = torch.stack(
        [muon_run([stacked[e]], [[g[e]] for g in gradients])[0] for e in range(4)]
    )
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-6)
    assert (together - stacked).abs().max() > 0.01


def test_muon_step_is_decay_then_the_orthogonalised_nesterov_momentum():
    start, g1, g2 = gaussian(24, 8), gaussian(24, 8, seed=1), gaussian(24, 8, seed=2)
    expected, buffer = start.clone(), torch.zeros_like(start)
    for g in (g1, g2):
        buffer = 0.9 * buffer + 0.1 * g
        update = zeropower_via_newtonschulz5((0.1 * g + 0.9 * buffer)[None])[0]
        expected = expected * (1 - 0.1 * 0.1) - 0.1 * math.sqrt(24 / 8) * update
    torch.testing.assert_close(muon_run([start], [[g1], [g2]])[0], expected, rtol=0, atol=1e-5)


class ThreadDist(Dist):
    """A rank that is a thread; sums meet at a barrier."""

    def join(self, slots: list, barrier: threading.Barrier) -> "ThreadDist":
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "barrier", barrier)
        return self

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.slots[self.rank] = tensor.clone()
        self.barrier.wait(timeout=20)
        tensor.copy_(sum(self.slots))
        self.barrier.wait(timeout=20)
        return tensor


def on_ranks(world_size: int, work) -> list:
    """Results of `work(dist)` on every rank."""
    slots, barrier, results = (
        [None] * world_size,
        threading.Barrier(world_size),
        [None] * world_size,
    )

    def run(rank: int) -> None:
        results[rank] = work(ThreadDist(rank, world_size, torch.device("cpu")).join(slots, barrier))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_muon_on_several_ranks_is_muon_on_one(world_size):
    shapes = [(16, 8), (3, 16, 8), (8, 16), (8, 8), (4, 8, 8)]
    params = [gaussian(*shape, seed=i) for i, shape in enumerate(shapes)]
    gradients = [
        [gaussian(*shape, seed=10 * s + i) for i, shape in enumerate(shapes)] for s in (1, 2)
    ]
    alone = muon_run(params, gradients)
    for ranked in on_ranks(world_size, lambda dist: muon_run(params, gradients, dist)):
        for expected, actual in zip(alone, ranked, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert all(
        (before - after).abs().max() > 0.01 for before, after in zip(params, alone, strict=True)
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_training_step_on_several_ranks_is_that_of_the_joint_batch(world_size):
    hp, ids = tiny_hp(), make_ids(tiny_hp(), 4, 17)

    def work(dist) -> tuple:
        model = make_model(hp)
        rows = ids.chunk(dist.world_size)[dist.rank]
        gradients = Gradients(model, dist)
        loss = train_step(
            model, build_optimizers(hp, model, dist), gradients, [(rows[:, :-1], rows[:, 1:])], 0.3
        )
        return (
            loss,
            gradients.flat[64:],
            torch.cat([p.detach().flatten() for p in model.parameters()]),
        )

    loss, gradient, weights = work(ALONE)
    for ranked in on_ranks(world_size, work):
        torch.testing.assert_close(ranked[0], loss, rtol=1e-5, atol=0)
        assert (ranked[1] - gradient).norm() < 1e-4 * gradient.norm()
    joint, single = on_ranks(world_size, work)[0][2], weights
    assert (joint - single).abs().mean() < 1e-4


# ---- Parameter groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(itertools.product(ROUTING, MU)), ids="-".join)
def test_every_parameter_has_one_group_and_the_optimizer_of_its_role(mode):
    hp = tiny_hp(**dict(zip(("routing", "mu"), mode, strict=True)), moe_start_layer=1)
    model = GPT(hp)
    roles = Counter(role_of(name) for name, _ in model.named_parameters())
    assert roles["router"] == (3 if hp.routing in ("learned", "hybrid", "soft") else 0)
    assert roles["expert"] == (6 if hp.routing != "dense" else 0)
    muon, adam = build_optimizers(hp, model, ALONE)
    groups = {
        id(p): (o, group) for o in (muon, adam) for group in o.param_groups for p in group["params"]
    }
    assert len(groups) == sum(
        len(group["params"]) for o in (muon, adam) for group in o.param_groups
    )
    assert set(groups) == set(map(id, model.parameters()))
    for name, p in model.named_parameters():
        optimizer, group = groups[id(p)]
        assert optimizer is (muon if role_of(name) in ("matrix", "expert") else adam), name
        decay, lr = {
            "matrix": (hp.muon_weight_decay, hp.matrix_lr),
            "expert": (hp.muon_weight_decay, hp.matrix_lr),
            "embedding": (hp.embed_weight_decay, hp.embed_lr),
        }.get(role_of(name), (0.0, hp.scalar_lr))
        assert (group["weight_decay"], group["lr"], group["base_lr"]) == (decay, lr, lr), name


def test_parameter_of_unknown_role_is_refused():
    assert role_of("blocks.3.attn.c_q.weight") == "matrix"
    for name in (
        "trigram.weight",
        "blocks.3.attn.c_q.bias",
        "tok_emb.weight.extra",
        "blocks.x.attn.c_q.weight",
    ):
        with pytest.raises(AssertionError, match=name):
            role_of(name)
    model = GPT(tiny_hp())
    build_optimizers(model.hp, model, ALONE)
    model.trigram = torch.nn.Linear(4, 4)
    with pytest.raises(AssertionError, match=r"trigram\.weight"):
        build_optimizers(model.hp, model, ALONE)


def test_parameter_in_no_group_is_refused(monkeypatch):
    model = GPT(tiny_hp())
    roles = dict(train_gpt.ROLES, orphan=r"orphan")
    monkeypatch.setattr(train_gpt, "ROLES", roles)
    build_optimizers(model.hp, model, ALONE)
    model.orphan = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="exactly one optimizer group"):
        build_optimizers(model.hp, model, ALONE)


# ---- Schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cycles", [1, 2, 3, 5])
@pytest.mark.parametrize("min_lr", [0.0, 0.1])
def test_sgdr_peaks_shrink_and_every_cycle_ends_at_the_floor(cycles, min_lr):
    hp = tiny_hp(sgdr_cycles=cycles, min_lr=min_lr, loop_passes=1)
    bounds = sgdr_bounds(hp)
    assert bounds[0] == 0
    assert bounds[-1] == 1
    lengths = np.diff(bounds)
    assert lengths[1:] == pytest.approx(2 * lengths[:-1])
    assert [lr_scale(hp, start) for start in bounds[:-1]] == pytest.approx(
        [0.7**i for i in range(cycles)]
    )
    for start, end in itertools.pairwise(bounds):
        inside = [
            lr_scale(hp, start + share * (end - start)) for share in np.linspace(0, 1 - 1e-6, 200)
        ]
        assert all(a > b for a, b in itertools.pairwise(inside))
        assert inside[-1] == pytest.approx(min_lr, abs=1e-6)
    assert lr_scale(hp, 1.0) == pytest.approx(min_lr)
    assert lr_scale(hp, 1.2) == pytest.approx(min_lr)


def test_sgdr_peak_never_falls_below_the_floor():
    hp = tiny_hp(sgdr_cycles=4, min_lr=0.6)
    assert [lr_scale(hp, start) for start in sgdr_bounds(hp)] == pytest.approx(
        [1.0, 0.7, 0.6, 0.6, 0.6]
    )


@pytest.mark.parametrize("cycles", [1, 2, 3])
@pytest.mark.parametrize("loop_from", [0.0, 0.35, 0.6])
def test_last_restart_meets_the_start_of_the_recurrence(cycles, loop_from):
    hp = tiny_hp(sgdr_cycles=cycles, loop_from=loop_from)
    bounds, alone = sgdr_bounds(hp), sgdr_bounds(replace(hp, loop_passes=1))
    assert (bounds[0], bounds[-1], len(bounds)) == (0.0, 1.0, cycles + 1)
    if cycles == 1 or loop_from == 0:
        assert bounds == alone
        return
    assert bounds[-2] == pytest.approx(loop_from)
    assert np.diff(bounds[:-1])[1:] == pytest.approx(2 * np.diff(bounds[:-1])[:-1])
    assert lr_scale(hp, loop_from - 1e-6) == pytest.approx(hp.min_lr, abs=1e-4)
    assert lr_scale(hp, bounds[-2]) == pytest.approx(0.7 ** (cycles - 1))


@pytest.mark.parametrize("warmdown", [0.25, 0.85, 1.0])
def test_linear_schedule_is_constant_and_then_linear_to_the_floor(warmdown):
    hp = tiny_hp(schedule="linear", warmdown_frac=warmdown, min_lr=0.1)
    for frac in np.linspace(0, 1 - warmdown, 9):
        assert lr_scale(hp, frac) == pytest.approx(1.0)
    for left in np.linspace(1, 0.1, 9):
        assert lr_scale(hp, 1 - left * warmdown) == pytest.approx(left)
    assert lr_scale(hp, 1 - 0.05 * warmdown) == lr_scale(hp, 1.0) == lr_scale(hp, 1.1) == 0.1


def test_linear_schedule_without_warmdown_is_constant():
    hp = tiny_hp(schedule="linear", warmdown_frac=0.0)
    assert [lr_scale(hp, frac) for frac in (0.0, 0.5, 1.0)] == [1.0] * 3


def test_schedules_scale_every_group_and_ramp_muons_momentum():
    hp = tiny_hp(muon_momentum=0.97)
    muon, adam = build_optimizers(hp, GPT(hp), ALONE)
    for frac, momentum in ((0.0, 0.85), (0.05, 0.91), (0.1, 0.97), (0.7, 0.97), (1.0, 0.97)):
        scale = set_schedules(hp, [muon, adam], frac)
        assert scale == lr_scale(hp, frac)
        assert [group["momentum"] for group in muon.param_groups] == pytest.approx(
            [momentum] * len(muon.param_groups)
        )
        for group in muon.param_groups + adam.param_groups:
            assert group["lr"] == pytest.approx(group["base_lr"] * scale)
    low = tiny_hp(muon_momentum=0.5)
    set_schedules(low, [muon], 0.0)
    assert muon.param_groups[0]["momentum"] == 0.5


class Rig:
    """`train` on a tiny model with a fake clock: a step takes what `seconds` yields and sets all weights to `value`."""

    def __init__(self, monkeypatch, hp, seconds, value=lambda step: step + 1.0):
        self.hp, self.now, self.lrs, self.fracs, self.lines, self.looped = hp, 0.0, [], [], [], []
        self.model = make_model(hp)
        self.seconds, self.value = seconds, value
        monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(train_gpt, "train_step", self.step)
        true_set = train_gpt.set_schedules
        monkeypatch.setattr(
            train_gpt,
            "set_schedules",
            lambda hp, o, frac: (self.fracs.append(frac), true_set(hp, o, frac))[1],
        )

    def step(self, model, optimizers, gradients, batches, max_norm, looped) -> torch.Tensor:
        self.now += next(self.seconds)
        self.looped.append(looped)
        self.lrs.append(optimizers[0].param_groups[0]["lr"] / self.hp.matrix_lr)
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(self.value(len(self.lrs) - 1))
        return torch.tensor(1.0)

    def train(self) -> tuple:
        loader = SimpleNamespace(
            next_batch=lambda: None, hp=self.hp, dist=ALONE, num_sequences=4, num_windows=9
        )
        return train(self.hp, ALONE, self.lines.append, self.model, loader, None)

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_timed_run_meets_every_restart_and_the_floor_whatever_its_steps_take(monkeypatch, cycles):
    knobs = {"max_wallclock_seconds": 600.0, "gptq_batches": 0, "num_layers": 1, "average": "off"}
    hp = tiny_hp(**knobs, iterations=20_000, sgdr_cycles=cycles)
    rng = np.random.default_rng(0)
    rig = Rig(monkeypatch, hp, iter(lambda: float(rng.choice([0.3, 0.6, 0.6, 0.9, 2.0])), None))
    steps, seconds = rig.train()
    assert steps == len(rig.lrs)
    assert 595 < seconds <= 600.0 + 2.0
    restarts = [i for i in range(1, steps) if rig.lrs[i] > rig.lrs[i - 1] + 0.1]
    assert len(restarts) == cycles - 1
    for cycle, i in enumerate(restarts, 1):
        assert rig.lrs[i] == pytest.approx(0.7**cycle, abs=0.01)
        assert rig.lrs[i - 1] == pytest.approx(hp.min_lr, abs=0.01)
        assert rig.fracs[i] == pytest.approx(sgdr_bounds(hp)[cycle], abs=0.005)
    assert rig.lrs[0] == pytest.approx(1.0)
    assert rig.lrs[-1] == pytest.approx(hp.min_lr, abs=0.01)


@pytest.mark.parametrize("loop_from", [0.0, 0.35, 0.9])
def test_recurrence_and_its_restart_begin_at_their_share_of_what_the_hessians_leave(
    monkeypatch, loop_from
):
    knobs = {"max_wallclock_seconds": 600.0, "gptq_reserve_seconds": 100.0, "average": "off"}
    rig = Rig(monkeypatch, tiny_hp(**knobs, loop_from=loop_from), itertools.repeat(0.5))
    rig.hp = replace(rig.hp, iterations=20_000)
    steps, seconds = rig.train()
    assert 497 < seconds <= 500
    switched = rig.looped.index(True)
    assert rig.looped == [False] * switched + [True] * (steps - switched)
    assert switched == pytest.approx(loop_from * 1000, abs=1)
    announced = [line for line in rig.lines if line.startswith("layer_loop:enabled")]
    assert len(announced) == (loop_from > 0)
    assert all(f"step:{switched} " in line and "[0, 1, 2, 1, 2, 3]" in line for line in announced)
    if loop_from:
        assert rig.lrs[switched - 1] == pytest.approx(rig.hp.min_lr, abs=0.01)
        assert rig.lrs[switched] == pytest.approx(0.7, abs=0.01)


def test_run_without_a_clock_takes_all_steps_and_meets_the_floor(monkeypatch):
    hp = tiny_hp(max_wallclock_seconds=0.0, iterations=300, average="off", num_layers=1)
    rig = Rig(monkeypatch, hp, itertools.repeat(50.0))
    assert rig.train() == (300, 15_000.0)
    assert rig.lrs[100] == pytest.approx(0.7)
    assert rig.lrs[-1] == pytest.approx(hp.min_lr, abs=0.01)


# ---- Averaging -------------------------------------------------------------------------------------------------------


def effective_weights(hp, steps: int) -> list[float]:
    """Share of the start and of the parameters after each of `steps` steps in the average."""
    shares, count = [1.0], 0
    for step in range(steps):
        newest = average_weight(hp, step / steps, count)
        shares = [share * (1 - newest) for share in shares] + [newest]
        count += newest > 0
    assert sum(shares) == pytest.approx(1.0)
    return shares


def test_ema_follows_the_newest_weights_and_forgets_the_start():
    hp = tiny_hp(average="ema", ema_decay=0.9965)
    assert (
        0.55 < sum(effective_weights(hp, 1000)[-100:]) < 0.65
    )  # the warm-up still shortens the memory
    assert sum(effective_weights(hp, 5000)[-100:]) == pytest.approx(1 - 0.9965**100)
    assert effective_weights(hp, 30)[0] < 1e-7
    assert effective_weights(hp, 30)[1] < 1e-6
    assert average_weight(hp, 0.5, 100_000) == pytest.approx(1 - 0.9965)


def test_swa_weighs_the_steps_of_its_window_equally_and_no_others():
    shares = effective_weights(tiny_hp(average="swa", swa_start_frac=0.85), 1000)
    assert shares[:851] == [0.0] * 851
    assert shares[851:] == pytest.approx([1 / 150] * 150)


def test_average_off_takes_nothing_in():
    hp = tiny_hp(average="off")
    assert [average_weight(hp, frac, count) for frac in (0.0, 0.9, 1.0) for count in (0, 7)] == [
        0.0
    ] * 6


def test_training_leaves_the_mean_of_the_swa_window_in_the_model(monkeypatch):
    hp = tiny_hp(average="swa", swa_start_frac=0.85, iterations=40, num_layers=1)
    rig = Rig(monkeypatch, hp, itertools.repeat(1.0), value=lambda step: float(step**2))
    rig.train()
    expected = np.mean([step**2 for step in range(34, 40)])
    torch.testing.assert_close(
        rig.weights(), torch.full_like(rig.weights(), expected), rtol=1e-5, atol=0
    )


def test_training_leaves_the_ema_in_the_model_once(monkeypatch):
    hp = tiny_hp(average="ema", iterations=50, num_layers=1)
    rig = Rig(monkeypatch, hp, itertools.repeat(1.0), value=lambda step: float(step))
    start = rig.weights()
    rig.train()
    shares = effective_weights(hp, 50)
    expected = start * shares[0] + sum(step * share for step, share in enumerate(shares[1:]))
    torch.testing.assert_close(rig.weights(), expected, rtol=1e-5, atol=0)
    assert 1 < expected[0] < 48


def test_training_without_averaging_leaves_the_last_weights(monkeypatch):
    rig = Rig(
        monkeypatch, tiny_hp(average="off", iterations=7, num_layers=1), itertools.repeat(1.0)
    )
    rig.train()
    assert (rig.weights() == 7.0).all()


def test_average_of_constant_weights_is_those_weights(monkeypatch):
    for average in ("ema", "swa"):
        hp = tiny_hp(average=average, iterations=300, num_layers=1)
        with monkeypatch.context() as patch:
            rig = Rig(patch, hp, itertools.repeat(1.0), value=lambda step: 2.5)
            rig.train()
        torch.testing.assert_close(
            rig.weights(), torch.full_like(rig.weights(), 2.5), rtol=1e-6, atol=0
        )


# ---- Gradients and warm-up -------------------------------------------------------------------------------------------


def batch_of(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("dispatch", DISPATCH)
def test_gradients_are_views_of_the_flat_buffer_and_stay_so(dispatch):
    model = make_model(tiny_hp(dispatch=dispatch))
    gradients, ids = Gradients(model, ALONE), make_ids(model.hp, 4, 17)
    optimizers = build_optimizers(model.hp, model, ALONE)
    for _ in range(2):
        train_step(model, optimizers, gradients, [batch_of(ids)] * 2, max_norm=0.3)
        begin, end = (
            gradients.flat.data_ptr(),
            gradients.flat.data_ptr() + 4 * gradients.flat.numel(),
        )
        spans = sorted((p.grad.data_ptr(), 4 * p.numel()) for p in model.parameters())
        assert all(begin + 256 <= start and start + size <= end for start, size in spans)
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(spans))
        assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_accumulated_micro_batches_are_one_large_batch():
    results = []
    for parts in (1, 2, 4):
        model, ids = make_model(tiny_hp()), make_ids(tiny_hp(), 4, 17)
        gradients = Gradients(model, ALONE)
        optimizers = build_optimizers(model.hp, model, ALONE)
        loss = train_step(
            model,
            optimizers,
            gradients,
            [batch_of(rows) for rows in ids.chunk(parts)],
            max_norm=0.0,
        )
        with torch.no_grad():
            expected = make_model(tiny_hp())(*batch_of(ids))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        results.append(gradients.flat[64:])
    for accumulated in results[1:]:
        assert (accumulated - results[0]).norm() < 1e-4 * results[0].norm()
    assert results[0].norm() > 0.1


def test_step_starts_from_zero_gradients():
    model = make_model(tiny_hp())
    gradients, batches = Gradients(model, ALONE), [batch_of(make_ids(tiny_hp(), 4, 17))]
    losses, norms = [], []
    for stale in (0.0, 5.0):
        gradients.flat.fill_(stale)
        losses.append(train_step(model, [], gradients, batches, max_norm=0.0).item())
        norms.append(gradients.flat[64:].norm().item())
    assert losses[0] == losses[1]
    assert norms[0] == norms[1] > 0


def test_clipping_bounds_the_norm_keeps_the_direction_and_spares_small_gradients_and_the_loss():
    model = make_model(tiny_hp())
    gradients, batches = Gradients(model, ALONE), [batch_of(make_ids(tiny_hp(), 4, 17))]
    flats = {}
    for max_norm in (0.0, 0.05, 1e6):
        train_step(model, [], gradients, batches, max_norm)
        flats[max_norm] = gradients.flat.clone()
    free, clipped = flats[0.0], flats[0.05]
    assert free[64:].norm() > 0.1
    assert 0.0499 < clipped[64:].norm() <= 0.05
    torch.testing.assert_close(
        clipped[64:] / 0.05, free[64:] / free[64:].norm(), rtol=1e-4, atol=1e-6
    )
    assert torch.equal(flats[1e6], free)
    assert clipped[0] == free[0] > 1


def test_warm_up_runs_every_graph_that_training_will_run():
    expected = {(1, 0.5): [True] * 2, (2, 0.5): [False] * 2 + [True] * 2, (2, 0.0): [True] * 2}
    for (passes, loop_from), graphs in expected.items():
        hp = tiny_hp(loop_passes=passes, loop_from=loop_from, warmup_steps=2)
        model, seen = make_model(hp), []

        def forward(ids, targets, looped, model=model, seen=seen):
            seen.append(looped)
            return model(ids, targets, looped=looped)

        warm_up(
            forward,
            model,
            [],
            Gradients(model, ALONE),
            SimpleNamespace(hp=hp, dist=ALONE, num_sequences=4),
        )
        assert seen == graphs


def test_warm_up_leaves_no_trace():
    results = []
    for warmup_steps in (0, 3):
        hp = tiny_hp(warmup_steps=warmup_steps)
        model = make_model(hp)
        start = copy.deepcopy(model.state_dict())
        optimizers, gradients = build_optimizers(hp, model, ALONE), Gradients(model, ALONE)
        states = copy.deepcopy([o.state_dict() for o in optimizers])
        warm_up(
            model, model, optimizers, gradients, SimpleNamespace(hp=hp, dist=ALONE, num_sequences=4)
        )
        assert all(torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())
        assert [o.state_dict() for o in optimizers] == states
        assert bool(gradients.flat.any()) == bool(warmup_steps)
        for seed in range(3):
            train_step(
                model,
                optimizers,
                gradients,
                [batch_of(make_ids(hp, 4, 17, seed))],
                hp.grad_clip_norm,
            )
        results.append(model.state_dict())
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())
    assert not torch.equal(results[0]["tok_emb.weight"], start["tok_emb.weight"])


def test_defaults_are_those_of_a_valid_record_run():
    Hyperparameters().validate()

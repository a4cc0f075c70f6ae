"""A run that is stopped and resumed is the run that was not, bit for bit.

A run "dies" here by an exception between two steps that nothing catches; test_faults.py kills
processes for real.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALONE, make_model, tiny_hp
from helpers_cli import (
    Dataset,
    Result,
    assert_refused,
    cli_env,
    run_in_process,
    train_losses,
    write_dataset,
)
from helpers_faults import assert_readable, files_in, run_ranks

import train_gpt
from train_gpt import Checkpoints, ConfigError, Progression, TokenLoader, build_optimizers

STEPS = 12
FORMS = [
    {"ROUTING": "learned", "AVERAGE": "swa", "VAL_LOSS_EVERY": 4, "SCHEDULE": "linear"},
]
MORE_FORMS = [
    {},
    {"DISPATCH": "grouped", "MU": "pid", "SCHEDULE": "linear", "QAT_FROM": 0.5, "EXPERT_BITS": 2},
    {"ROUTING": "soft", "MU": "full", "AVERAGE": "off", "MICRO_BATCH_TOKENS": 32},
    {"DTYPE": "bfloat16", "ROUTING": "dense", "AVERAGE": "swa"},
]
FORMS += [pytest.param(form, marks=pytest.mark.slow) for form in MORE_FORMS]


class Died(BaseException):
    """A death that leaves what is on the disk, and nothing else."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", val_docs=2)


@pytest.fixture
def run(dataset, tmp_path, monkeypatch) -> Callable:
    """Function that trains in a folder, to die before the step after `dies_after`.

    Gives the outcome and the losses of all steps, to the last bit.
    """
    honest = train_gpt.train_step

    def train(
        folder: str = "a", dies_after: int = STEPS, **knobs
    ) -> tuple[Result | None, list[float]]:
        losses = []

        def step(*args) -> torch.Tensor:
            if len(losses) == dies_after:
                raise Died
            loss = honest(*args)
            losses.append(loss.item())
            return loss

        (tmp_path / folder).mkdir(exist_ok=True)
        every = {"ITERATIONS": STEPS, "LOOP_FROM": 0.5, "CHECKPOINT_EVERY": 5, "TARGET_BYTES": 0}
        env = cli_env(dataset, **{**every, **knobs})
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt, "train_step", step)
            try:
                return run_in_process(train_gpt.main, env, tmp_path / folder), losses
            except Died:
                return None, losses

    return train


@pytest.fixture
def stopped(run, tmp_path) -> Path:
    """The logs of a run with two checkpoints, of steps 5 and 10."""
    run(dies_after=11)
    return tmp_path / "a" / "logs"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.p*")}


def load(folder: Path, step: int) -> dict:
    return torch.load(folder / f"run.step{step:08d}.pt", weights_only=True)


def tensors(saved: object, place: str = "") -> dict[str, torch.Tensor]:
    """Return every tensor in nested dictionaries and lists by its place."""
    if isinstance(saved, torch.Tensor):
        return {place: saved}
    found = {}
    if isinstance(saved, dict | list):
        for key, value in saved.items() if isinstance(saved, dict) else enumerate(saved):
            found |= tensors(value, f"{place}/{key}")
    return found


# ---- Stopped and resumed


@pytest.mark.parametrize("knobs", FORMS, ids=str)
def test_a_run_that_died_and_resumed_is_the_run_that_did_not(knobs, run, tmp_path):
    whole, expected = run("whole", **knobs)
    assert whole.code == 0, whole.err
    result, first = run(dies_after=8, **knobs)
    ours, theirs = tmp_path / "a" / "logs", tmp_path / "whole" / "logs"
    assert (result, first) == (None, expected[:8])
    assert files_in(ours) == ["run.step00000005.pt", "run.txt"]
    resumed, second = run(**knobs)
    assert resumed.code == 0, resumed.err
    assert second == expected[5:]
    assert "resumed:logs/run.step00000005.pt step:5 train_time:" in resumed.out
    assert (ours / "run.ptz").read_bytes() == (theirs / "run.ptz").read_bytes()
    mine, others = tensors(load(ours, STEPS)), tensors(load(theirs, STEPS))
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[place], others[place]) for place in mine)
    assert resumed.summary["val_bpb"] == whole.summary["val_bpb"]


def test_checkpoints_change_nothing_and_the_last_two_stay(run, tmp_path):
    plain, expected = run("plain", CHECKPOINT_EVERY="")
    saved, losses = run("saved", CHECKPOINT_EVERY=1)
    assert losses == expected
    assert saved.summary["val_bpb"] == plain.summary["val_bpb"]
    assert files_in(tmp_path / "plain" / "logs") == ["run.ptz", "run.txt"]
    steps = ["run.step00000011.pt", "run.step00000012.pt"]
    assert files_in(tmp_path / "saved" / "logs") == ["run.ptz", *steps, "run.txt"]
    said = [line for line in saved.out.splitlines() if line.startswith("checkpoint:logs/run.step")]
    assert len(said) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["momentum_buffer", "exp_avg", "/average/0"])
def test_every_kind_of_state_matters(lost, run, tmp_path):
    """Control: what is resumed without one kind of tensor is another run."""
    whole, expected = run("whole")
    run(dies_after=8)
    folder = tmp_path / "a" / "logs"
    saved = load(folder, 5)
    places = [tensor for place, tensor in tensors(saved).items() if place.endswith(lost)]
    assert places
    for tensor in places:
        tensor.zero_()
    torch.save(saved, folder / "run.step00000005.pt")
    resumed, losses = run()
    assert resumed.code == 0
    same = losses == expected[5:], resumed.summary["val_bpb"] == whole.summary["val_bpb"]
    assert same == ("average" in lost, False)


@pytest.mark.slow
def test_a_run_that_dies_again_and_again_gets_there(run, tmp_path):
    whole, expected = run("whole")
    seen: dict[int, float] = {}
    for _ in range(6):
        steps = [int(name[8:16]) for name in files_in(tmp_path / "a" / "logs") if "step" in name]
        result, losses = run(dies_after=4, CHECKPOINT_EVERY=3)
        seen |= dict(enumerate(losses, max(steps, default=0)))
        if result:
            break
    assert [seen[step] for step in range(STEPS)] == expected
    assert result.summary["val_bpb"] == whole.summary["val_bpb"]
    assert_readable(tmp_path / "a" / "logs")


@pytest.mark.slow
def test_what_dies_after_the_last_step_needs_no_further_step(run, tmp_path, monkeypatch):
    def die(*args) -> None:
        raise Died

    whole, _ = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "export", die)
        assert run()[0] is None
    resumed, losses = run()
    assert (resumed.code, losses) == (0, [])
    assert resumed.summary["val_bpb"] == whole.summary["val_bpb"]


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer_with_the_data_that_follow(run):
    constant = {"WARMDOWN_FRAC": 0, "LOOP_FROM": 0, "MUON_MOMENTUM": 0.8, "SCHEDULE": "linear"}
    _, expected = run("long", ITERATIONS=9, **constant)
    run(ITERATIONS=4, **constant)
    _, losses = run(ITERATIONS=9, **constant)
    assert losses == expected[4:]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1)])
def test_a_run_resumes_at_another_number_of_ranks(before, after, run, dataset, tmp_path):
    _, expected = run("whole", TRAIN_BATCH_TOKENS=256)
    knobs = {"ITERATIONS": STEPS, "LOOP_FROM": 0.5, "CHECKPOINT_EVERY": 5}
    env = cli_env(dataset, TRAIN_BATCH_TOKENS=256, **knobs)
    folder = tmp_path / "ranks"
    folder.mkdir()
    fault = f"term train_gpt.train_step 7 {before - 1}"
    died = run_ranks("train_gpt", env, folder, fault, world_size=before)
    assert set(died.codes) == {143}
    resumed = run_ranks("train_gpt", env, folder, world_size=after)
    assert resumed.codes == [0] * after, resumed.err
    assert "resumed:logs/run.step00000007.pt step:7 " in resumed.out[0]
    assert train_losses(resumed.out[0]) == pytest.approx(expected[7:], abs=2e-5)


# ---- When, what and for how long


@pytest.mark.parametrize(
    ("every", "times", "expected"),
    [
        ("4", (1, 2, 3, 9, 9.5, 9.9, 10, 30), [4, 8]),
        ("7s", (1, 6.9, 7, 8, 13.9, 14.1, 14.2, 30), [3, 6, 8]),
    ],
)
def test_the_interval_is_in_steps_or_seconds_and_no_state_that_is_not_finite_is_saved(
    every, times, expected, dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    paths = {"data_path": str(dataset.folder), "vocab_size": 340}
    hp = tiny_hp(run_id="run", checkpoint_every=every, **paths)
    model = make_model(hp)
    average = [p.detach().clone() for p in model.parameters()]
    optimizers = build_optimizers(hp, model, ALONE)
    loader = TokenLoader(hp, ALONE)
    checkpoints = Checkpoints(lambda text: None, model, optimizers, average, loader)
    seen = set()
    for step, elapsed in enumerate(times, 1):
        checkpoints.save(Progression(step, elapsed), at_once=False)
        seen |= set(files_in(tmp_path / "logs"))
    assert sorted(seen) == [f"run.step{step:08d}.pt" for step in expected]
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[0, 0] = torch.inf
    with pytest.raises(ConfigError, match="not finite at step 9: "):
        checkpoints.save(Progression(9, 40.0), at_once=True)
    assert not (tmp_path / "logs" / "run.step00000009.pt").exists()


@pytest.mark.slow
def test_seconds_of_training_go_on_from_those_of_the_checkpoint(run, tmp_path):
    run(dies_after=8)
    folder = tmp_path / "a" / "logs"
    saved = load(folder, 5)
    saved["now"]["elapsed"] = 77.0
    torch.save(saved, folder / "run.step00000005.pt")
    shutil.copytree(folder, tmp_path / "b" / "logs")
    capped, losses = run(MAX_WALLCLOCK_SECONDS=78, GPTQ_BATCHES=0)
    assert (capped.code, losses) == (0, [])
    assert 77 < capped.summary["train_seconds"] < 78
    assert "stopping_early: wallclock_cap" in capped.out
    open_ended, losses = run("b")
    assert len(losses) == STEPS - 5
    assert 77 < open_ended.summary["train_seconds"] < 100


@pytest.mark.slow
@pytest.mark.parametrize("draws", [0, 1])
def test_no_step_draws_from_a_generator_that_a_checkpoint_would_have_to_keep(
    draws, run, monkeypatch
):
    """The control draws once in every evaluation."""
    states, train, evaluate = [], train_gpt.train, train_gpt.evaluate

    def observed_train(*args):
        for moment in ("before", "after"):
            result = train(*args) if moment == "after" else None
            numpy_state = np.random.get_state()[1].tolist()
            states.append((torch.get_rng_state().tolist(), random.getstate(), numpy_state))
        return result

    def drawing(*args):
        torch.rand(draws)
        return evaluate(*args)

    monkeypatch.setattr(train_gpt, "train", observed_train)
    monkeypatch.setattr(train_gpt, "evaluate", drawing)
    assert run(VAL_LOSS_EVERY=5)[0].code == 0
    assert (states[0] != states[1]) == bool(draws)


# ---- Refused


SLOW_DAMAGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("cut", "empty", "foreign")]


@pytest.mark.parametrize("damage", ["flipped", *SLOW_DAMAGE])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, stopped, run):
    path = stopped / "run.step00000010.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = {"cut": data[:-9], "flipped": data, "empty": b"", "foreign": b"PK" + bytes(500)}
    path.write_bytes(damaged[damage])
    _, expected = run("whole")
    resumed, losses = run()
    assert (resumed.code, losses) == (0, expected[5:])
    assert "warning: logs/run.step00000010.pt: damaged checkpoint (" in resumed.out
    assert_readable(stopped)


@pytest.mark.slow
def test_without_an_intact_checkpoint_nothing_begins_anew(stopped, run):
    for path in stopped.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-9])
    said = [f"run.step{step:08d}.pt: damaged checkpoint" for step in (10, 5)]
    resumed, losses = run()
    assert_refused(resumed, *said)
    assert losses == []


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"SEED": 3}, "is of another run: SEED=1337, now 3"),
        ({"TRAIN_BATCH_TOKENS": 256}, "is of another run: TRAIN_BATCH_TOKENS=128, now 256"),
        ({"MU": "off"}, "is of another run: MU=vector, now off"),
        ({"DATA_PATH": "other"}, "is of another run: TRAIN_WINDOWS="),
        ({"CHECKPOINT_EVERY": ""}, "is there: CHECKPOINT_EVERY goes on, another RUN_ID begins"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(knobs, said, stopped, run, tmp_path):
    before = contents(stopped)
    if "DATA_PATH" in knobs:
        knobs = {"DATA_PATH": write_dataset(tmp_path / "other", train_seed=50).folder}
    result, losses = run(**knobs)
    assert_refused(result, f"logs/run.step00000010.pt {said}")
    assert losses == []
    assert contents(stopped) == before

"""A run that is stopped and resumed is the run that was not, bit for bit.

A run "dies" here by an exception between two steps that nothing catches; test_faults.py kills
processes for real.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoints, tiny_hp
from helpers_cli import Result, assert_refused, cli_env, run_in_process, train_losses, write_dataset
from helpers_faults import files_in, run_ranks
from helpers_hostile import refusal

import train_gpt
from train_gpt import Progression

STEPS = 12
EVERY = {"ITERATIONS": STEPS, "LOOP_FROM": 0.5, "CHECKPOINT_EVERY": 5, "TARGET_BYTES": 0}
FORMS = [{"ROUTING": "learned", "AVERAGE": "swa", "VAL_LOSS_EVERY": 4, "SCHEDULE": "linear"}]
MORE_FORMS = [
    {"DISPATCH": "grouped", "MU": "pid", "SCHEDULE": "linear", "QAT_FROM": 0.5, "EXPERT_BITS": 2},
    {"DTYPE": "bfloat16", "MU": "full", "AVERAGE": "off", "MICRO_BATCH_TOKENS": 32},
]
FORMS += [pytest.param(form, marks=pytest.mark.slow) for form in MORE_FORMS]


class Died(BaseException):
    """A death that leaves what is on the disk, and nothing else."""


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
        env = cli_env(dataset, **{**EVERY, **knobs})
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
    for name in ("val_bpb_float", "val_bpb"):
        assert resumed.summary[name] == whole.summary[name]


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
def test_a_finished_run_can_be_made_longer_with_the_data_that_follow(run):
    constant = {"WARMDOWN_FRAC": 0, "LOOP_FROM": 0, "MUON_MOMENTUM": 0.8, "SCHEDULE": "linear"}
    _, expected = run("long", ITERATIONS=9, **constant)
    run(ITERATIONS=4, **constant)
    _, losses = run(ITERATIONS=9, **constant)
    assert losses == expected[4:]


@pytest.mark.slow
def test_a_run_resumes_at_another_number_of_ranks(run, dataset, tmp_path):
    """From one to two; test_faults.py does so from two to one."""
    _, expected = run("whole")
    run(dies_after=8)
    resumed = run_ranks("train_gpt", cli_env(dataset, **EVERY), tmp_path / "a")
    assert resumed.codes == [0, 0], resumed.err
    assert "resumed:logs/run.step00000005.pt step:5 " in resumed.out[0]
    assert train_losses(resumed.out[0]) == pytest.approx(expected[5:], abs=2e-5)


# ---- When, and what is refused


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
    checkpoints = make_checkpoints(tiny_hp(run_id="run", checkpoint_every=every, **paths))
    seen = set()
    for step, elapsed in enumerate(times, 1):
        checkpoints.save(Progression(step, elapsed), at_once=False)
        seen |= set(files_in(tmp_path / "logs"))
    assert sorted(seen) == [f"run.step{step:08d}.pt" for step in expected]
    with torch.no_grad():
        checkpoints.model.blocks[0].attn.proj.weight[0, 0] = torch.inf
    message = refusal(checkpoints.save, Progression(9, 40.0), True)
    assert "not finite at step 9: " in message
    assert not (tmp_path / "logs" / "run.step00000009.pt").exists()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(stopped, run):
    path = stopped / "run.step00000010.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    _, expected = run("whole")
    resumed, losses = run()
    assert (resumed.code, losses) == (0, expected[5:])
    assert "warning: logs/run.step00000010.pt: damaged checkpoint (" in resumed.out


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
    before = {path: path.read_bytes() for path in stopped.glob("*.pt")}
    if "DATA_PATH" in knobs:
        knobs = {"DATA_PATH": write_dataset(tmp_path / "other", train_seed=50).folder}
    result, losses = run(**knobs)
    assert_refused(result, f"logs/run.step00000010.pt {said}")
    assert losses == []
    assert {path: path.read_bytes() for path in stopped.glob("*.pt")} == before

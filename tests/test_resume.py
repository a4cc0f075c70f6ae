"""A run that is stopped and resumed is the run that was not, bit for bit.   pytest tests/test_resume.py

A run "dies" here by an exception between two steps that nothing catches; tests/test_faults.py kills processes for real.
"""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_hp
from helpers_cli import (
    ALONE,
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
from train_gpt import Checkpoints, Hyperparameters, Refusal, build_optimizers

STEPS = 12
FORMS = {
    "zipf": {},
    "grouped": {"DISPATCH": "grouped"},
    "learned": {
        "ROUTING": "learned",
        "AVERAGE": "swa",
        "SWA_START_FRAC": 0.5,
        "WARMDOWN_FRAC": 0.6,
    },
    "sgdr": {"SCHEDULE": "sgdr", "MU": "pid", "AVERAGE": "off", "LOOP_FROM": 0.6},
    "bfloat16": {"DTYPE": "bfloat16", "MU": "lowrank", "WARMUP_STEPS": 1},
    "accumulated": {"MICRO_BATCH_TOKENS": 32, "ROUTING": "cluster", "VAL_LOSS_EVERY": 4},
}


class Died(BaseException):
    """A death that leaves what is on the disk, and nothing else."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def run(dataset, tmp_path, monkeypatch):
    """Function that trains in a folder below tmp_path, to die before the step after `dies_after`, and gives the losses
    of all steps, to the last bit, with the outcome."""
    honest = train_gpt.train_step

    def train(
        folder: str = "a", dies_after: int | None = None, **knobs
    ) -> tuple[Result | None, list[float]]:
        losses = []

        def step(*args) -> torch.Tensor:
            if len(losses) == dies_after:
                raise Died
            loss = honest(*args)
            losses.append(loss.item())
            return loss

        (tmp_path / folder).mkdir(exist_ok=True)
        env = cli_env(
            dataset, **{"ITERATIONS": STEPS, "LOOP_FROM": 0.5, "GPTQ_BATCHES": 2, **knobs}
        )
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt, "train_step", step)
            try:
                return run_in_process(train_gpt.main, env, tmp_path / folder), losses
            except Died:
                return None, losses

    return train


def logs(tmp_path: Path, folder: str = "a") -> Path:
    return tmp_path / folder / "logs"


def checkpoint(tmp_path: Path, step: int, folder: str = "a") -> dict[str, np.ndarray]:
    with np.load(logs(tmp_path, folder) / f"run.step{step:08d}.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Equal tensors; the seconds of two runs differ."""
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"meta"}:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].tobytes() == theirs[name].tobytes(), name


# ---- Stopped and resumed


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_died_and_resumed_is_the_run_that_did_not(form, run, tmp_path):
    knobs = {**FORMS[form], "CHECKPOINT_EVERY": 5}
    whole, expected = run("whole", **knobs)
    assert whole.code == 0, whole.err
    warm = len(expected) - STEPS
    result, first = run(dies_after=warm + 8, **knobs)
    assert (result, first) == (None, expected[: warm + 8])
    assert files_in(logs(tmp_path)) == ["run.step00000005.npz", "run.txt"]
    resumed, second = run(**knobs, RESUME="auto")
    assert resumed.code == 0, resumed.err
    assert second[warm:] == expected[warm + 5 :]
    assert "resumed:logs/run.step00000005.npz step:5 train_time:" in resumed.out
    assert (logs(tmp_path) / "run.ptz").read_bytes() == (
        logs(tmp_path, "whole") / "run.ptz"
    ).read_bytes()
    assert_same(checkpoint(tmp_path, STEPS), checkpoint(tmp_path, STEPS, "whole"))
    assert resumed.summary["val_bpb"] == whole.summary["val_bpb"]


def test_checkpoints_change_nothing_and_are_off_by_default(run, tmp_path):
    _, expected = run("plain")
    _, losses = run("saved", CHECKPOINT_EVERY=1)
    assert losses == expected
    assert files_in(logs(tmp_path, "plain")) == ["run.ptz", "run.txt"]
    assert (logs(tmp_path, "saved") / "run.ptz").read_bytes() == (
        logs(tmp_path, "plain") / "run.ptz"
    ).read_bytes()
    assert Hyperparameters().checkpoint_every == ""


@pytest.mark.parametrize(
    "lost", ["optimizer0/0/momentum_buffer", "optimizer1/0/exp_avg", "average/tok_emb.weight"]
)
def test_every_kind_of_state_matters(lost, run, tmp_path):
    """Control: what is resumed with one tensor from the start of the run is another run."""
    whole, expected = run("whole", CHECKPOINT_EVERY=5)
    run(dies_after=8, CHECKPOINT_EVERY=5)
    tensors = checkpoint(tmp_path, 5)
    tensors[lost] = np.zeros_like(tensors[lost])
    np.savez(logs(tmp_path) / "run.step00000005.npz", **tensors)
    resumed, losses = run(RESUME="auto", CHECKPOINT_EVERY=5)
    assert resumed.code == 0
    same = losses == expected[5:], resumed.summary["val_bpb"] == whole.summary["val_bpb"]
    assert same == (lost.startswith("average"), False)


def test_a_run_that_dies_again_and_again_gets_there(run, tmp_path):
    whole, expected = run("whole", CHECKPOINT_EVERY=3)
    seen: dict[int, float] = {}
    for _ in range(10):
        start = max(
            (int(name[8:16]) for name in files_in(logs(tmp_path)) if name.endswith("npz")),
            default=0,
        )
        result, losses = run(dies_after=4, CHECKPOINT_EVERY=3, RESUME="auto")
        seen |= dict(enumerate(losses, start))
        if result:
            break
    assert result.code == 0
    assert [seen[step] for step in range(STEPS)] == expected
    assert result.summary["val_bpb"] == whole.summary["val_bpb"]
    assert_readable(logs(tmp_path))


def test_what_dies_after_the_last_step_needs_no_further_step(run, tmp_path, monkeypatch):
    run("whole", CHECKPOINT_EVERY=100)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "export", lambda *args: (_ for _ in ()).throw(Died))
        assert run(CHECKPOINT_EVERY=100)[0] is None
    assert files_in(logs(tmp_path)) == [f"run.step{STEPS:08d}.npz", "run.txt"]
    resumed, losses = run(CHECKPOINT_EVERY=100, RESUME="auto")
    assert (resumed.code, losses) == (0, [])
    assert (logs(tmp_path) / "run.ptz").read_bytes() == (
        logs(tmp_path, "whole") / "run.ptz"
    ).read_bytes()


def test_a_finished_run_can_be_made_longer_with_the_data_that_follow(run, tmp_path):
    schedule = {
        "WARMDOWN_FRAC": 0,
        "LOOP_FROM": 0,
        "MUON_MOMENTUM": 0.8,
    }  # no function of the length
    _, expected = run("long", ITERATIONS=9, **schedule)
    run(ITERATIONS=4, CHECKPOINT_EVERY=100, **schedule)
    _, losses = run(ITERATIONS=9, RESUME="auto", **schedule)
    assert losses == expected[4:]


def test_a_path_resumes_under_another_name(run, tmp_path):
    _, expected = run("whole", CHECKPOINT_EVERY=5)
    source = logs(tmp_path, "whole") / "run.step00000010.npz"
    resumed, losses = run(RESUME=source, RUN_ID="branch", CHECKPOINT_EVERY=1)
    assert (resumed.code, losses) == (0, expected[10:])
    saved = [f"branch.step000000{step}.npz" for step in (11, 12)]
    assert files_in(logs(tmp_path)) == ["branch.ptz", *saved, "branch.txt"]
    assert source.exists()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_a_run_resumes_at_another_number_of_ranks(before, after, run, dataset, tmp_path):
    _, expected = run("whole", TRAIN_BATCH_TOKENS=256)
    env = cli_env(
        dataset, ITERATIONS=STEPS, LOOP_FROM=0.5, TRAIN_BATCH_TOKENS=256, CHECKPOINT_EVERY=5
    )
    folder = tmp_path / "ranks"
    folder.mkdir()
    died = run_ranks(
        "train_gpt", env, folder, f"term train_gpt.train_step 7 {before - 1}", world_size=before
    )
    assert set(died.codes) == {143}
    resumed = run_ranks(
        "train_gpt",
        {**env, "RESUME": "auto"},
        folder,
        "none train_gpt.fit 1 0",
        world_size=after,
        limit=100,
    )
    assert resumed.codes == [0] * after, resumed.err
    assert "resumed:logs/run.step00000007.npz step:7 " in resumed.out[0]
    losses = train_losses(resumed.out[0])
    assert len(losses) == STEPS - 7 - 2  # steps 11 and 12 are not logged
    assert losses == pytest.approx(expected[7:10], abs=2e-5)


# ---- What is kept


def test_the_last_two_checkpoints_stay_and_a_signal_or_the_end_makes_one(run, tmp_path):
    result, _ = run(CHECKPOINT_EVERY=5)
    assert files_in(logs(tmp_path)) == [
        "run.ptz",
        "run.step00000010.npz",
        "run.step00000012.npz",
        "run.txt",
    ]
    said = [line.split()[0] for line in result.out.splitlines() if line.startswith("checkpoint:")]
    assert said == [f"checkpoint:logs/run.step{step:08d}.npz" for step in (5, 10, 12)]


def small(tmp_path, monkeypatch, **knobs) -> Checkpoints:
    """Checkpoints of a model of no steps, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    hp = tiny_hp(run_id="run", **knobs)
    model = make_model(hp)
    loader = SimpleNamespace(hp=hp, dist=ALONE, num_windows=7)
    average = [p.detach().clone() for p in model.parameters()]
    return Checkpoints(
        lambda text: None, model, build_optimizers(hp, model, ALONE), average, loader
    )


@pytest.mark.parametrize(
    ("every", "times", "expected"),
    [
        ("4", (1, 2, 3, 9, 9.5, 9.9, 10, 30), [4, 8]),
        ("7s", (1, 6.9, 7, 8, 13.9, 14.1, 14.2, 30), [3, 6, 8]),
    ],
)
def test_the_interval_is_in_steps_or_seconds(every, times, expected, tmp_path, monkeypatch):
    checkpoints, saved = small(tmp_path, monkeypatch, checkpoint_every=every), []
    monkeypatch.setattr(
        train_gpt, "write_atomically", lambda path, data: saved.append(int(path.name[8:16]))
    )
    for step, elapsed in enumerate(times, 1):
        checkpoints.save(step, elapsed, 0, now=False)
    assert saved == expected


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    checkpoints = small(tmp_path, monkeypatch, checkpoint_every="1")
    checkpoints.save(1, 0.0, 0, now=False)
    with torch.no_grad():
        checkpoints.model.blocks[0].attn.proj.weight[0, 0] = torch.inf
    with pytest.raises(Refusal, match="not finite at step 2: stopped"):
        checkpoints.save(2, 0.0, 0, now=False)
    assert files_in(tmp_path / "logs") == ["run.step00000001.npz"]


def test_a_checkpoint_is_of_every_tensor_that_a_step_changes(run, tmp_path):
    run(CHECKPOINT_EVERY=6)
    early, late = checkpoint(tmp_path, 6), checkpoint(tmp_path, 12)
    model = {name for name in early if name.startswith("model/")}
    hp = Hyperparameters(
        **{name: late_knobs(late)[name] for name in train_gpt.MODEL_KNOBS}, eval_stride=8
    )
    names = dict(train_gpt.GPT(hp).named_parameters())
    assert model == {f"model/{name}" for name in [*names, "expert_table"]}
    assert {name for name in early if name.startswith("average/")} == {
        f"average/{name}" for name in names
    }
    moments = {name.rsplit("/", 1)[1] for name in early if name.startswith("optimizer")}
    assert moments == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert np.array_equal(early["model/expert_table"], late["model/expert_table"])
    assert not np.array_equal(
        early["optimizer0/0/momentum_buffer"], late["optimizer0/0/momentum_buffer"]
    )


def late_knobs(arrays: dict[str, np.ndarray]) -> dict:
    return json.loads(str(arrays["meta"]))[0]


# ---- The schedule's clock, and randomness


def test_seconds_of_training_go_on_from_those_of_the_checkpoint(run, tmp_path):
    run(dies_after=8, CHECKPOINT_EVERY=5)
    tensors = checkpoint(tmp_path, 5)
    fixed, (step, _, averaged) = json.loads(str(tensors["meta"]))
    tensors["meta"] = np.array(json.dumps([fixed, [step, 77.0, averaged]]))
    np.savez(logs(tmp_path) / "run.step00000005.npz", **tensors)
    shutil.copytree(logs(tmp_path), logs(tmp_path, "b"))
    capped, losses = run(RESUME="auto", MAX_WALLCLOCK_SECONDS=78, GPTQ_BATCHES=0)
    assert (capped.code, losses) == (0, [])
    assert 77 < capped.summary["train_seconds"] < 78
    assert "stopping_early: wallclock_cap" in capped.out
    open_ended, losses = run("b", RESUME="auto", MAX_WALLCLOCK_SECONDS=0)
    assert len(losses) == STEPS - 5
    assert 77 < open_ended.summary["train_seconds"] < 100


@pytest.mark.parametrize("draws", [False, True])
def test_no_step_draws_from_a_generator_that_a_checkpoint_would_have_to_keep(
    draws, run, monkeypatch
):
    """With a control that draws once in every evaluation."""
    states, train, evaluate = [], train_gpt.train, train_gpt.evaluate

    def observe() -> None:
        states.append(
            (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        )

    def observed_train(*args) -> tuple:
        observe()
        result = train(*args)
        observe()
        return result

    def drawing(*args) -> train_gpt.Score:
        torch.rand(int(draws))
        return evaluate(*args)

    monkeypatch.setattr(train_gpt, "train", observed_train)
    monkeypatch.setattr(train_gpt, "evaluate", drawing)
    result, losses = run(CHECKPOINT_EVERY=5, WARMUP_STEPS=1, ROUTING="cluster", VAL_LOSS_EVERY=5)
    assert (result.code, len(losses)) == (0, STEPS + 2)
    assert (states[0] != states[1]) == draws


# ---- Refused


@pytest.fixture
def stopped(run, tmp_path):
    """A run with two checkpoints, of steps 5 and 10."""
    run(dies_after=11, CHECKPOINT_EVERY=5)
    return logs(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "another zip"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, stopped, run):
    path = stopped / "run.step00000010.npz"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(
        {"cut": data[: len(data) // 2], "empty": b"", "foreign": b"PK" + bytes(500)}.get(
            damage, data
        )
    )
    if damage == "another zip":
        np.savez(path, a=np.zeros(3))
    _, expected = run("whole")
    resumed, losses = run(RESUME="auto", CHECKPOINT_EVERY=5)
    assert (resumed.code, losses) == (0, expected[5:])
    assert "warning: logs/run.step00000010.npz: damaged checkpoint (" in resumed.out
    assert_readable(stopped)


def test_without_an_intact_checkpoint_nothing_begins_anew(stopped, run):
    for path in stopped.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-9])
    resumed, losses = run(RESUME="auto")
    assert_refused(
        resumed,
        "run.step00000010.npz: damaged checkpoint",
        "run.step00000005.npz: damaged checkpoint",
    )
    assert losses == []


def test_resume_auto_without_a_checkpoint_starts_the_run(run):
    result, losses = run(RESUME="auto")
    assert (result.code, losses) == (0, run("b")[1])


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"SEED": 3}, "SEED=1337, now 3"),
        ({"TRAIN_BATCH_TOKENS": 256}, "TRAIN_BATCH_TOKENS=128, now 256"),
        ({"SHARED_DIM": 40}, "SHARED_DIM=32, now 40"),
        ({"MU": "off"}, "MU=vector, now off"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(knobs, said, stopped, run):
    before = {path.name: path.read_bytes() for path in stopped.glob("*.npz")}
    result, _ = run(RESUME="auto", **knobs)
    assert_refused(result, "logs/run.step00000010.npz is of another run: ", said)
    assert {path.name: path.read_bytes() for path in stopped.glob("*.npz")} == before


def test_other_data_are_refused(stopped, run, tmp_path):
    other = write_dataset(tmp_path / "other", train_seed=50)
    result, _ = run(RESUME="auto", DATA_PATH=other.folder)
    assert_refused(result, "logs/run.step00000010.npz is of another run: TRAIN_WINDOWS=")


def test_checkpoints_of_a_run_are_not_overwritten_by_a_new_one(stopped, run):
    before = {path.name: path.read_bytes() for path in stopped.glob("*.npz")}
    for knobs in ({}, {"RESUME": "logs/run.step00000005.npz"}):
        result, losses = run(**knobs, CHECKPOINT_EVERY=5)
        assert_refused(
            result,
            "logs/run.step00000010.npz is there: RESUME=auto goes on from it, another RUN_ID",
        )
        assert losses == []
    assert {path.name: path.read_bytes() for path in stopped.glob("*.npz")} == before
    result, losses = run(RESUME=stopped / "run.step00000010.npz")
    assert (result.code, len(losses)) == (0, 2)


def test_a_path_without_a_checkpoint_is_refused(run):
    result, losses = run(RESUME="logs/none.npz")
    assert_refused(result, "logs/none.npz")
    assert losses == []


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (
            {"CHECKPOINT_EVERY": "0"},
            "CHECKPOINT_EVERY=0: expected steps as in 500, or s as in 300s",
        ),
        ({"CHECKPOINT_EVERY": "5m"}, "CHECKPOINT_EVERY=5m: expected"),
        ({"CHECKPOINT_EVERY": "-3"}, "CHECKPOINT_EVERY=-3: expected"),
        ({"RESUME": "auto", "RUN_ID": ""}, "RESUME=auto RUN_ID=: RUN_ID says whose checkpoints"),
    ],
)
def test_knobs_that_mean_nothing_are_refused(knobs, said, run):
    result, losses = run(**knobs)
    assert_refused(result, said)
    assert losses == []

"""Whatever happens to a run: one clear line, a status, and no file that cannot be read.

Ranks run without a launcher, so that survivors have to notice by themselves. What befalls a single
process befalls this one where it can.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_hp
from helpers_cli import (
    Dataset,
    Result,
    Run,
    assert_refused,
    cli_env,
    eval_env,
    run_command,
    run_in_process,
    train,
    train_losses,
    wait_for,
    without_progress,
    write_dataset,
)
from helpers_faults import assert_readable, files_in, planted, run_ranks, start

import eval_sliding
import train_gpt

SAVED = {"CHECKPOINT_EVERY": "3"}
SAVED_3, SAVED_5, SAVED_6, SAVED_8 = [f"run.step{step:08d}.pt" for step in (3, 5, 6, 8)]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Run:
    """A run without a fault."""
    return train(tmp_path_factory.mktemp("trained"), dataset, **SAVED)


def befall(fault: str, dataset: Dataset, folder: Path, **knobs: object) -> Result:
    """Train with a fault in this process."""
    with planted(fault):
        env = cli_env(dataset, **{**SAVED, **knobs})
        return run_in_process(train_gpt.main, env, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- A failing export, a killed rank, a signal


def test_weights_outlive_a_failing_export_and_the_same_command_exports_them(
    dataset, trained, tmp_path
):
    result = befall("no_memory train_gpt.export 1 0", dataset, tmp_path, CHECKPOINT_EVERY="")
    assert (result.code, result.err) == (2, "error: out of memory: CUDA out of memory\n")
    assert files_in(tmp_path / "logs") == [SAVED_8, "run.txt"]
    assert "CHECKPOINT_EVERY=1)" in result.out
    assert train(tmp_path, dataset, **SAVED).same_as(trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "rank", "files"),
    [
        ("train_gpt.train_step 5", 0, [SAVED_3]),
        ("train_gpt.export 1", 1, ["run.ptz", SAVED_6, SAVED_8]),
        ("train_gpt.os.replace 4", 0, [SAVED_6, SAVED_8]),  # of the artifact
    ],
)
def test_a_rank_killed_anywhere_ends_the_other_and_the_run_goes_on_later(
    where, rank, files, dataset, trained, tmp_path
):
    outcome = run_ranks("train_gpt", cli_env(dataset, **SAVED), tmp_path, f"kill {where} {rank}")
    other = 1 - rank
    assert (outcome.codes[rank], outcome.codes[other]) == (-9, 2), outcome.err
    assert re.fullmatch(f"error: rank {other} lost another rank: .*\n", outcome.err[other])
    assert [name for name in outcome.files if not name.endswith(".tmp")] == [*files, "run.txt"]
    assert_readable(tmp_path / "logs")
    again = train(tmp_path, dataset, **SAVED).result
    step = int(files[-1][8:16])
    assert f"resumed:logs/{files[-1]} step:{step} " in again.out
    assert train_losses(again.out) == pytest.approx(trained.losses[step:], abs=2e-5)


@pytest.mark.slow
def test_a_signal_to_one_rank_lets_all_end_the_step_save_and_leave(dataset, tmp_path):
    fault = "term train_gpt.train_step 5 1"
    outcome = run_ranks("train_gpt", cli_env(dataset, **SAVED), tmp_path, fault)
    assert outcome.codes == [143, 143]
    assert outcome.err == ["error: interrupted by signal 15\n"] * 2
    assert outcome.files == [SAVED_3, SAVED_5, "run.txt"]
    assert f"checkpoint:logs/{SAVED_5} train_time:" in outcome.out[0]
    assert "(to go on: the same command with RUN_ID=run CHECKPOINT_EVERY=3)" in outcome.out[0]
    assert outcome.out[0].endswith("interrupted after step 5, CHECKPOINT_EVERY=3\n")
    assert_readable(tmp_path / "logs")


@pytest.mark.parametrize(
    ("name", "code", "where", "files"),
    [
        ("term", 143, "train_gpt.TokenLoader.sample", []),
        ("interrupt", 130, "train_gpt.evaluate", [SAVED_6, SAVED_8]),
        ("term", 143, "train_gpt.fit", []),
        ("interrupt", 130, "train_gpt.train_step", ["run.step00000001.pt"]),
    ],
)
def test_a_signal_anywhere_ends_the_run_with_one_line(name, code, where, files, dataset, tmp_path):
    result = befall(f"{name} {where} 1 0", dataset, tmp_path)
    assert (result.code, result.err) == (code, f"error: interrupted by signal {code - 128}\n")
    assert files_in(tmp_path / "logs") == [*files, "run.txt"]
    assert_readable(tmp_path / "logs")


# ---- The disk, the data, the clock, the compiler


@pytest.fixture
def logs(tmp_path) -> Iterator[Path]:
    """A log folder on a disk of its own; the test is skipped where nobody may mount one."""
    folder = tmp_path / "logs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("where", "knobs", "name", "files"),
    [
        ("train_gpt.write_atomically 2", {}, SAVED_6, [SAVED_3]),
        ("train_gpt.write_atomically 4", {}, "run.ptz", [SAVED_6, SAVED_8]),
        ("train_gpt.train_step 1", {"ITERATIONS": 99, "CHECKPOINT_EVERY": 99}, "run.txt", []),
    ],
)
def test_a_full_disk_is_named_with_the_file_and_the_run_goes_on_later(
    where, knobs, name, files, dataset, logs
):
    result = befall(f"fill_disk {where} 0", dataset, logs.parent, **knobs)
    said = f"error: cannot write logs/{name}: No space left on device\n"
    assert (result.code, result.err) == (2, said)
    (logs / "junk").unlink()
    assert files_in(logs) == [*files, "run.txt"]
    train(logs.parent, dataset, **SAVED)
    assert_readable(logs)


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("cut_shards", r".*fineweb_train_\d\.bin: has become shorter since the start of the run"),
        ("clock_back", r"the clock went back by \d+\.\d s at step 5: stopped"),
    ],
)
def test_what_ends_a_run_is_said_in_one_line(action, said, tmp_path):
    own = write_dataset(tmp_path / "set")
    result = befall(f"{action} train_gpt.train_step 5 0", own, tmp_path)
    assert result.code == 2
    assert re.fullmatch(f"error: {said}\n", result.err)
    assert files_in(tmp_path / "logs") == [SAVED_3, "run.txt"]


@pytest.mark.slow
def test_a_gpu_is_never_more_than_two_steps_behind_the_clock(monkeypatch):
    happened = []

    class Event:
        def record(self) -> None:
            happened.append(("recorded", self))

        def synchronize(self) -> None:
            happened.append(("awaited", self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    on_gpu = train_gpt.Dist(0, 1, torch.device("cuda"))
    clock = train_gpt.Clock(tiny_hp(), on_gpu, train_gpt.Progression())
    for _ in range(5):
        clock.tick()
    clock.release()
    recorded = [event for what, event in happened if what == "recorded"]
    awaited = [event for what, event in happened if what == "awaited"]
    assert awaited == recorded[:3]
    assert happened.index(("awaited", recorded[0])) == 3


def test_a_broken_compiler_is_found_before_the_clock_starts(dataset, tmp_path):
    if not train_gpt.can_compile(train_gpt.Hyperparameters(), torch.device("cpu")):
        pytest.skip("no C++ compiler or no Python.h")
    for name in ("g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = run_command("train_gpt.py", cli_env(dataset, COMPILE=1) | paths, tmp_path)
    assert_refused(result, "error: compiling failed; COMPILE=0 runs eager (")
    assert "step:1/" not in result.out


# ---- Other runs


@contextlib.contextmanager
def held(dataset: Dataset, folder: Path, *launcher: str) -> Iterator[subprocess.Popen]:
    """Hold a training in its fifth step, until there is a file "go"; kill it in the end."""
    fault = "wait train_gpt.train_step 5 0"
    process = start("train_gpt", cli_env(dataset, **SAVED), folder, fault, launcher=launcher)
    try:
        wait_for((folder / "reached").exists)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_runs_and_evaluations_in_one_folder_leave_each_others_files_alone(
    dataset, trained, tmp_path
):
    logs = tmp_path / "logs"
    logs.mkdir()
    shutil.copy(trained.artifact, logs)
    with held(dataset, tmp_path) as first:
        before = contents(logs)
        said = "error: logs/run.txt: another run writes it; choose another RUN_ID\n"
        result = run_in_process(train_gpt.main, cli_env(dataset, **SAVED), tmp_path)
        assert result == Result(2, "", said)
        result = run_in_process(eval_sliding.main, eval_env(dataset), tmp_path, "logs/run.ptz")
        assert result == Result(2, "", said)
        train(tmp_path, dataset, **SAVED, RUN_ID="run.step")
        assert contents(logs).items() >= before.items()
        (tmp_path / "go").touch()
        _, err = first.communicate(timeout=60)
    assert (first.returncode, without_progress(err)) == (0, "")
    for name in ("run.ptz", "run.step.ptz"):
        assert contents(logs)[name] == trained.artifact.read_bytes()
    assert len(contents(logs)) == 2 * len(contents(trained.folder / "logs")) == 8


def test_runs_without_a_name_get_names_of_their_own(dataset, tmp_path):
    for _ in range(2):
        env = cli_env(dataset, ITERATIONS=1, GPTQ_BATCHES=0, RUN_ID=None)
        assert run_in_process(train_gpt.main, env, tmp_path).code == 0
    names = files_in(tmp_path / "logs")
    assert len(names) == 4
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d{6}\.\d{3}\.(ptz|txt)", name) for name in names)


@pytest.mark.slow
def test_sigterm_to_torchrun_lets_the_ranks_save(dataset, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    with held(dataset, tmp_path, *launcher) as run:
        run.terminate()
        threading.Timer(1.0, (tmp_path / "go").touch).start()
        out, err = run.communicate(timeout=60)
    assert run.returncode != 0
    assert err.count("error: interrupted by signal 15") == 2, err
    assert "interrupted after step 5, CHECKPOINT_EVERY=3" in out
    assert SAVED_5 in files_in(tmp_path / "logs")

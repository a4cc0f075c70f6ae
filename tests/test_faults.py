"""Whatever happens to a run: one clear line, a status, and no file that cannot be read.

Ranks run without a launcher, so that survivors have to notice by themselves; torchrun is at the
end. What befalls a single process befalls this one where it can.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers_cli import (
    ROOT,
    Dataset,
    Result,
    Run,
    assert_refused,
    cli_env,
    eval_env,
    full_environment,
    run_command,
    run_in_process,
    train,
    without_progress,
    write_dataset,
)
from helpers_faults import Outcome, assert_readable, files_in, planted, run_ranks

import eval_sliding
import train_gpt

SAVED = {"CHECKPOINT_EVERY": "3"}
SAVED_3, SAVED_5, SAVED_6, SAVED_8 = [f"run.step{step:08d}.pt" for step in (3, 5, 6, 8)]
LOST = "error: rank {} lost another rank: "


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", val_docs=4)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Run:
    """A run without a fault."""
    return train(tmp_path_factory.mktemp("trained"), dataset, **SAVED)


def befall(fault: str, dataset: Dataset, folder: Path, **knobs: object) -> Result:
    """Train with a fault in this process."""
    with planted(fault):
        env = cli_env(dataset, **{**SAVED, **knobs})
        return run_in_process(train_gpt.main, env, folder)


def losses(text: str) -> dict[str, float]:
    found = re.findall(r"^step:(\d+)/\d+ train_loss:(\S+)", text, re.MULTILINE)
    return {step: float(loss) for step, loss in found}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- The export fails


def test_weights_outlive_a_failing_export_and_the_same_command_exports_them(
    dataset, trained, tmp_path
):
    result = befall("no_space train_gpt.export 1 0", dataset, tmp_path, CHECKPOINT_EVERY="")
    assert (result.code, result.err) == (2, "error: [Errno 28] No space left on device\n")
    assert [path.name for path in sorted((tmp_path / "logs").iterdir())] == [SAVED_8, "run.txt"]
    assert "CHECKPOINT_EVERY=1)" in result.out
    again = train(tmp_path, dataset, **SAVED)
    assert again.same_as(trained)


# ---- The compiler fails


@pytest.mark.slow
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


# ---- A rank is killed


def assert_lost(outcome: Outcome, killed: int) -> None:
    """Check that the other rank noticed within a minute, said so in one line and left."""
    other = 1 - killed
    assert outcome.codes[killed] == -9
    assert outcome.codes[other] == 2, outcome.err[other]
    assert len(outcome.errors(other)) == 1
    assert outcome.errors(other)[0].startswith(LOST.format(other))
    assert "Traceback" not in outcome.err[other]
    assert outcome.seconds < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "rank", "files"),
    [
        ("train_gpt.train_step 5", 0, [SAVED_3]),
        ("train_gpt.Scorer.score 1", 1, [SAVED_6, SAVED_8]),
        ("train_gpt.export 1", 1, ["run.ptz", SAVED_6, SAVED_8]),
    ],
)
def test_a_rank_killed_in_training_ends_the_other_and_the_run_goes_on_later(
    where, rank, files, dataset, trained, tmp_path
):
    outcome = run_ranks("train_gpt", cli_env(dataset, **SAVED), tmp_path, f"kill {where} {rank}")
    assert_lost(outcome, rank)
    assert outcome.files == [*files, "run.txt"]
    assert_readable(tmp_path / "logs")
    again = train(tmp_path, dataset, **SAVED).result
    step = int(files[-1][8:16])
    assert f"resumed:logs/{files[-1]} step:{step} " in again.out
    expected = {key: loss for key, loss in losses(trained.log).items() if int(key) > step}
    assert losses(again.out) == pytest.approx(expected, abs=2e-5)


@pytest.mark.slow
def test_a_rank_killed_while_it_writes_the_artifact_leaves_none(dataset, tmp_path):
    env = cli_env(dataset, CHECKPOINT_EVERY=3, ITERATIONS=4)
    outcome = run_ranks("train_gpt", env, tmp_path, "kill train_gpt.os.replace 3 0")
    assert_lost(outcome, 0)
    assert re.fullmatch(r"\.run\.ptz\.\d+\.tmp", outcome.files[0])
    assert outcome.files[1:] == [SAVED_3, "run.step00000004.pt", "run.txt"]
    assert_readable(tmp_path / "logs")


@pytest.mark.slow
def test_a_rank_killed_in_sliding_evaluation_ends_the_other(dataset, trained, tmp_path):
    shutil.copytree(trained.folder / "logs", tmp_path / "logs")
    before = contents(tmp_path / "logs")
    fault = "kill train_gpt.Scorer.batch 3 1"
    outcome = run_ranks("eval_sliding", eval_env(dataset), tmp_path, fault, "logs/run.ptz")
    assert_lost(outcome, 1)
    after = contents(tmp_path / "logs")
    assert after.pop("run.txt").startswith(before.pop("run.txt"))
    assert after == before


# ---- A signal


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code", "rank"), [("term", 143, 0), ("interrupt", 130, 1)])
def test_a_signal_to_one_rank_lets_all_end_the_step_save_and_leave(
    name, code, rank, dataset, tmp_path
):
    fault = f"{name} train_gpt.train_step 5 {rank}"
    outcome = run_ranks("train_gpt", cli_env(dataset, **SAVED), tmp_path, fault)
    assert outcome.codes == [code, code]
    assert outcome.err == [f"error: interrupted by signal {code - 128}\n"] * 2
    assert outcome.files == [SAVED_3, SAVED_5, "run.txt"]
    assert f"checkpoint:logs/{SAVED_5} train_time:" in outcome.out[0]
    again = "(to go on: the same command with RUN_ID=run CHECKPOINT_EVERY=3)"
    assert again in outcome.out[0]
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


# ---- The disk is full


@contextlib.contextmanager
def mounted_logs(folder: Path, options: str) -> Iterator[None]:
    """Mount a tmpfs at the log folder; skip the test where nobody may."""
    (folder / "logs").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder / "logs"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder / "logs"], check=True)


@pytest.mark.parametrize(
    ("where", "knobs", "name", "files"),
    [
        ("train_gpt.write_atomically 2", {}, SAVED_6, [SAVED_3]),
        ("train_gpt.write_atomically 4", {}, "run.ptz", [SAVED_6, SAVED_8]),
        ("train_gpt.train_step 1", {"ITERATIONS": 99, "CHECKPOINT_EVERY": 99}, "run.txt", []),
    ],
)
def test_a_full_disk_is_named_with_the_file_and_the_run_goes_on_later(
    where, knobs, name, files, dataset, tmp_path
):
    said = f"error: cannot write logs/{name}: No space left on device\n"
    with mounted_logs(tmp_path, "size=4m"):
        result = befall(f"fill_disk {where} 0", dataset, tmp_path, **knobs)
        assert (result.code, result.err) == (2, said)
        (tmp_path / "logs" / "junk").unlink()
        assert files_in(tmp_path / "logs") == [*files, "run.txt"]
        train(tmp_path, dataset, **SAVED)
        assert_readable(tmp_path / "logs")


def test_a_full_disk_in_evaluation_is_named_with_the_log(dataset, trained, tmp_path):
    with mounted_logs(tmp_path, "size=4m"):
        shutil.copy(trained.artifact, tmp_path / "logs")
        with planted("fill_disk eval_sliding.load_artifact 1 0"):
            env = eval_env(dataset)
            result = run_in_process(eval_sliding.main, env, tmp_path, "logs/run.ptz")
        said = "error: cannot write logs/run.txt: No space left on device\n"
        assert (result.code, result.err) == (2, said)
        assert (tmp_path / "logs" / "run.ptz").read_bytes() == trained.artifact.read_bytes()


# ---- The loss, the data, the clock, the memory


@pytest.mark.slow
def test_a_loss_that_is_nan_on_one_rank_ends_both_and_is_never_saved(dataset, tmp_path):
    fault = "poison train_gpt.train_step 5 1"
    outcome = run_ranks("train_gpt", cli_env(dataset, **SAVED), tmp_path, fault)
    assert outcome.codes == [2, 2]
    said = "error: training loss is nan at step 5: stopped, nothing exported\n"
    # The log is rank 0's, but the loss of all ranks is the same.
    assert outcome.err == [said] * 2
    assert outcome.files == [SAVED_3, "run.txt"]


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("cut_shards", r".*fineweb_train_\d\.bin: has become shorter since the start of the run"),
        ("remove_shards", r"\[Errno 2\] No such file or directory: '.*fineweb_train_\d\.bin'"),
        ("clock_back", r"the clock went back by \d+\.\d s at step 5: stopped"),
    ],
)
def test_lost_data_and_a_clock_that_goes_back_end_the_run(action, said, tmp_path):
    own = write_dataset(tmp_path / "set")
    result = befall(f"{action} train_gpt.train_step 5 0", own, tmp_path)
    assert result.code == 2
    assert re.fullmatch(f"error: {said}\n", result.err)
    assert files_in(tmp_path / "logs") == [SAVED_3, "run.txt"]


def test_a_clock_that_jumps_ahead_ends_a_timed_run_as_its_cap_does(dataset, tmp_path):
    fault = "clock_ahead train_gpt.train_step 5 0"
    result = befall(fault, dataset, tmp_path, MAX_WALLCLOCK_SECONDS=1000)
    assert (result.code, result.err) == (0, "")
    stopped = r"^stopping_early: wallclock_cap train_time:1000\d{4}ms step:5/8$"
    assert re.search(stopped, result.out, re.MULTILINE)
    assert files_in(tmp_path / "logs") == ["run.ptz", SAVED_3, SAVED_5, "run.txt"]


@pytest.mark.slow
def test_a_run_out_of_memory_says_so(dataset, tmp_path):
    env = cli_env(dataset, **SAVED, MODEL_DIM=256, SHARED_DIM=512, GPTQ_BATCHES=0)
    fault = "forbid_memory train_gpt.quantize 2 0"
    outcome = run_ranks("train_gpt", env, tmp_path, fault, world_size=1)
    assert outcome.codes == [2], outcome.err
    assert re.match("error: out of memory: .", outcome.errors(0)[0])
    assert "Traceback" not in outcome.err[0]
    assert outcome.files == ["run.txt"]


# ---- Other runs


def wait_for(path: Path) -> None:
    until = time.perf_counter() + 60
    while not path.exists():
        assert time.perf_counter() < until, path
        time.sleep(0.01)


@contextlib.contextmanager
def started(
    dataset: Dataset, fault: str, folder: Path, *launcher: str
) -> Iterator[subprocess.Popen]:
    """Start a training with a fault in its own process, or under a launcher; kill it in the end."""
    command = [sys.executable, *launcher, str(ROOT / "tests" / "helpers_faults.py"), "train_gpt"]
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "data", "tests"))
    env = full_environment(cli_env(dataset, **SAVED)) | {"FAULT": fault, "PYTHONPATH": paths}
    process = subprocess.Popen(
        command,
        env=env,
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_runs_and_evaluations_in_one_folder_leave_each_others_files_alone(
    dataset, trained, tmp_path
):
    """The first is held in its fifth step while others of its name are refused."""
    logs = tmp_path / "logs"
    logs.mkdir()
    shutil.copy(trained.artifact, logs)
    with started(dataset, "wait train_gpt.train_step 5 0", tmp_path) as first:
        wait_for(tmp_path / "reached")
        before = contents(logs)
        env = cli_env(dataset, **SAVED)
        refused = run_in_process(train_gpt.main, env, tmp_path)
        said = "error: logs/run.txt: another run writes it; choose another RUN_ID\n"
        assert refused == Result(2, "", said)
        env = eval_env(dataset)
        assert run_in_process(eval_sliding.main, env, tmp_path, "logs/run.ptz") == refused
        train(tmp_path, dataset, **SAVED, RUN_ID="run.step")
        assert contents(logs).items() >= before.items()
        (tmp_path / "go").touch()
        _, err = first.communicate(timeout=60)
    assert (first.returncode, without_progress(err)) == (0, "")
    expected = contents(trained.folder / "logs")
    for name in ("run", "run.step"):
        own = re.compile(rf"{re.escape(name)}\.(step\d+\.pt|ptz|txt)")
        assert len([path for path in files_in(logs) if own.fullmatch(path)]) == len(expected) == 4
        assert contents(logs)[f"{name}.ptz"] == expected["run.ptz"]


def test_runs_without_a_name_get_names_of_their_own(dataset, tmp_path):
    for _ in range(2):
        env = cli_env(dataset, ITERATIONS=1, GPTQ_BATCHES=0, RUN_ID=None)
        assert run_in_process(train_gpt.main, env, tmp_path).code == 0
    names = files_in(tmp_path / "logs")
    assert len(names) == 4
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d{6}\.\d{3}\.(ptz|txt)", name) for name in names)


# ---- Under torchrun

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_ends_all_in_a_minute(dataset, tmp_path):
    with started(dataset, "kill train_gpt.train_step 5 1", tmp_path, *TORCHRUN) as run:
        _, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert re.search(f"^({LOST.format(0)}.*|error: interrupted by signal 15)$", err, re.MULTILINE)
    assert "Signal 9 (SIGKILL)" in err
    assert {SAVED_3, "run.txt"} <= set(files_in(tmp_path / "logs"))
    assert_readable(tmp_path / "logs")


@pytest.mark.slow
def test_sigterm_to_torchrun_lets_the_ranks_save(dataset, tmp_path):
    with started(dataset, "wait train_gpt.train_step 5 0", tmp_path, *TORCHRUN) as run:
        wait_for(tmp_path / "reached")
        run.terminate()
        threading.Timer(1.0, (tmp_path / "go").touch).start()
        out, err = run.communicate(timeout=60)
    assert run.returncode != 0
    assert err.count("error: interrupted by signal 15") == 2, err
    assert "interrupted after step 5, CHECKPOINT_EVERY=3" in out
    assert SAVED_5 in files_in(tmp_path / "logs")
    assert_readable(tmp_path / "logs")

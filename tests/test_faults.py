"""Whatever happens to a run: one clear line, a status, and no file that cannot be read.   pytest tests/test_faults.py

Ranks run without a launcher, so that survivors have to notice by themselves; torchrun is at the end. FAULT_TABLE=FILE
collects what was printed and what was on disk afterwards, a JSON row for each fault.
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
from helpers_cli import (
    ROOT,
    Dataset,
    cli_env,
    eval_env,
    full_environment,
    run_in_process,
    write_dataset,
)
from helpers_faults import Outcome, assert_readable, files_in, note, run_ranks

import train_gpt

SAVED = {"CHECKPOINT_EVERY": "3", "ITERATIONS": "8"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    """The folder of a whole run without a fault."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_in_process(train_gpt.main, cli_env(dataset, **SAVED), folder).code == 0
    return folder


def losses(text: str) -> dict[int, str]:
    return {
        int(step): loss
        for step, loss in re.findall(r"^step:(\d+)/\d+ train_loss:(\S+)", text, re.MULTILINE)
    }


def assert_lost(outcome: Outcome, killed: int) -> None:
    """The killed rank is gone, and the other noticed within a minute, said so in one line and left."""
    other = 1 - killed
    assert outcome.codes[killed] == -9
    assert outcome.codes[other] == 2, outcome.err[other]
    assert len(outcome.errors(other)) == 1
    assert outcome.errors(other)[0].startswith(f"error: rank {other} lost another rank: ")
    assert "Traceback" not in outcome.err[other]
    assert outcome.seconds < 60


# ---- A rank is killed


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("stage", "where"),
    [
        ("a step", "train_gpt.train_step 5"),
        ("validation", "train_gpt.Scorer.score 1"),
        ("export", "train_gpt.export 1"),
    ],
)
def test_a_rank_killed_in_training_ends_the_others(stage, where, rank, dataset, trained, tmp_path):
    outcome = run_ranks("train_gpt", cli_env(dataset, **SAVED), tmp_path, f"kill {where} {rank}")
    note(f"rank {rank} killed (SIGKILL)", stage, outcome)
    assert_lost(outcome, rank)
    steps = (3,) if stage == "a step" else (6, 8)
    written = ["run.ptz"] * (stage == "export" and rank == 1)
    assert outcome.files == [*written, *(f"run.step{step:08d}.npz" for step in steps), "run.txt"]
    assert_readable(tmp_path / "logs")
    again = run_in_process(train_gpt.main, cli_env(dataset, **SAVED, RESUME="auto"), tmp_path)
    assert again.code == 0, again.err
    assert f"resumed:logs/run.step{steps[-1]:08d}.npz step:{steps[-1]} " in again.out
    expected = losses((trained / "logs" / "run.txt").read_text())
    assert losses(again.out).keys() == {step for step in expected if step > steps[-1]}
    for step, loss in losses(again.out).items():
        assert float(loss) == pytest.approx(float(expected[step]), abs=2e-5)


@pytest.mark.parametrize("where", ["train_gpt.os.fsync 3", "train_gpt.os.replace 3"])
def test_a_rank_killed_while_it_writes_the_artifact_leaves_none(where, dataset, trained, tmp_path):
    outcome = run_ranks(
        "train_gpt", cli_env(dataset, **{**SAVED, "ITERATIONS": 4}), tmp_path, f"kill {where} 0"
    )
    note("rank 0 killed (SIGKILL)", f"writing the artifact, {where.split()[0][10:]}", outcome)
    assert_lost(outcome, 0)
    steps = ["run.step00000003.npz", "run.step00000004.npz"]
    assert [name for name in outcome.files if not name.startswith(".")] == [*steps, "run.txt"]
    assert re.fullmatch(r"\.run\.ptz\.\d+\.tmp", outcome.files[0])
    assert_readable(tmp_path / "logs")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_sliding_evaluation_ends_the_others(rank, dataset, trained, tmp_path):
    shutil.copytree(trained / "logs", tmp_path / "logs")
    before = {path.name: path.read_bytes() for path in (tmp_path / "logs").iterdir()}
    env = eval_env(dataset, MICRO_BATCH_TOKENS=128)
    outcome = run_ranks(
        "eval_sliding", env, tmp_path, f"kill train_gpt.Scorer.batch 3 {rank}", "logs/run.ptz"
    )
    note(f"rank {rank} killed (SIGKILL)", "sliding evaluation", outcome)
    assert_lost(outcome, rank)
    after = {path.name: path.read_bytes() for path in (tmp_path / "logs").iterdir()}
    assert after.pop("run.txt").startswith(before.pop("run.txt"))
    assert after == before


def test_without_a_fault_both_ranks_finish(dataset, trained, tmp_path):
    """Control of the harness."""
    outcome = run_ranks(
        "train_gpt", cli_env(dataset, **SAVED), tmp_path, "none train_gpt.train_step 5 1"
    )
    assert (outcome.codes, outcome.err) == ([0, 0], ["", ""])
    assert files_in(tmp_path / "logs") == files_in(trained / "logs")


# ---- A signal


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("name", "code"), [("term", 143), ("int", 130)])
def test_a_signal_to_one_rank_lets_all_end_the_step_save_and_leave(
    name, code, rank, dataset, trained, tmp_path
):
    outcome = run_ranks(
        "train_gpt", cli_env(dataset, **SAVED), tmp_path, f"{name} train_gpt.train_step 5 {rank}"
    )
    note(f"SIG{name.upper()} to rank {rank}", "a step", outcome)
    assert outcome.codes == [code, code]
    assert outcome.err == [f"error: interrupted by signal {code - 128}\n"] * 2
    assert outcome.files == ["run.step00000003.npz", "run.step00000005.npz", "run.txt"]
    saved = "checkpoint:logs/run.step00000005.npz train_time:"
    assert re.search(
        rf"^{re.escape(saved)}.* \(to go on: RUN_ID=run RESUME=auto\)$",
        outcome.out[0],
        re.MULTILINE,
    )
    assert outcome.out[0].endswith("interrupted after step 5, CHECKPOINT_EVERY=3\n")
    assert_readable(tmp_path / "logs")


@pytest.mark.parametrize(("name", "code"), [("term", 143), ("int", 130)])
@pytest.mark.parametrize(
    "where", ["train_gpt.TokenLoader.sample", "train_gpt.evaluate", "train_gpt.fit"]
)
def test_a_signal_outside_of_the_steps_ends_the_run_at_once(
    name, code, where, dataset, trained, tmp_path
):
    outcome = run_ranks(
        "train_gpt", cli_env(dataset, **SAVED), tmp_path, f"{name} {where} 1 0", world_size=1
    )
    note(f"SIG{name.upper()}", where, outcome)
    assert (outcome.codes, outcome.err) == (
        [code],
        [f"error: interrupted by signal {code - 128}\n"],
    )
    late = ["run.step00000006.npz", "run.step00000008.npz"]
    assert outcome.files == [*late * (where == "train_gpt.evaluate"), "run.txt"]
    assert_readable(tmp_path / "logs")


# ---- The disk is full


@contextlib.contextmanager
def mounted_logs(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs at the log folder; skips the test where nobody may mount one."""
    (folder / "logs").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder / "logs"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder / "logs"], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A folder whose logs lie on a file system of 1.5 MB."""
    with mounted_logs(tmp_path, "size=1536k"):
        yield tmp_path


@pytest.mark.parametrize(
    ("stage", "where", "name", "left"),
    [
        (
            "a checkpoint",
            "train_gpt.write_atomically 2",
            "run.step00000006.npz",
            ["run.step00000003.npz"],
        ),
        (
            "the artifact",
            "train_gpt.write_atomically 4",
            "run.ptz",
            ["run.step00000006.npz", "run.step00000008.npz"],
        ),
    ],
)
def test_a_full_disk_is_named_with_the_file(stage, where, name, left, dataset, small_disk):
    outcome = run_ranks("train_gpt", cli_env(dataset, **SAVED), small_disk, f"fill_disk {where} 0")
    note("disk full (tmpfs)", f"at the write of {stage}", outcome)
    assert outcome.codes == [2, 2], outcome.err
    assert outcome.errors(0) == [f"error: cannot write logs/{name}: No space left on device"]
    assert outcome.errors(1)[0].startswith("error: rank 1 lost another rank: ")
    assert outcome.seconds < 60
    (small_disk / "logs" / "junk").unlink()
    assert files_in(small_disk / "logs") == [*left, "run.txt"]
    again = run_in_process(train_gpt.main, cli_env(dataset, **SAVED, RESUME="auto"), small_disk)
    assert again.code == 0, again.err
    assert_readable(small_disk / "logs")


def test_a_full_disk_is_named_with_the_log(dataset, small_disk):
    env = cli_env(
        dataset, ITERATIONS=100, TRAIN_LOG_EVERY=1
    )  # more lines than fit the last page of the file
    outcome = run_ranks("train_gpt", env, small_disk, "fill_disk train_gpt.train_step 5 0")
    note("disk full (tmpfs)", "at the write of the log", outcome)
    assert outcome.codes == [2, 2], outcome.err
    assert outcome.errors(0) == ["error: cannot write logs/run.txt: No space left on device"]
    assert outcome.errors(1)[0].startswith("error: rank 1 lost another rank: ")
    assert outcome.files == ["junk", "run.txt"]


def test_a_full_disk_in_evaluation_is_named_with_the_log(dataset, trained, small_disk):
    shutil.copy(trained / "logs" / "run.ptz", small_disk / "logs")
    fault = "fill_disk eval_sliding.load_artifact 1 0"
    outcome = run_ranks(
        "eval_sliding", eval_env(dataset), small_disk, fault, "logs/run.ptz", world_size=1
    )
    note("disk full (tmpfs)", "at the write of the evaluation's log", outcome)
    assert outcome.codes == [2]
    assert outcome.err == ["error: cannot write logs/run.txt: No space left on device\n"]
    assert (small_disk / "logs" / "run.ptz").read_bytes() == (
        trained / "logs" / "run.ptz"
    ).read_bytes()


# ---- The loss, the data, the clock, the memory


def test_a_loss_that_is_nan_on_one_rank_ends_both_and_is_never_saved(dataset, trained, tmp_path):
    outcome = run_ranks(
        "train_gpt", cli_env(dataset, **SAVED), tmp_path, "poison train_gpt.train_step 5 1"
    )
    note("NaN on rank 1 only", "weights before a step", outcome)
    assert outcome.codes == [2, 2]
    assert outcome.err == ["error: training loss is nan at step 5: stopped, nothing exported\n"] * 2
    assert outcome.files == ["run.step00000003.npz", "run.txt"]
    assert_readable(tmp_path / "logs")


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (
            "cut_shards",
            r"error: .*fineweb_train_\d\.bin: has become shorter since the start of the run",
        ),
        (
            "remove_shards",
            r"error: \[Errno 2\] No such file or directory: '.*fineweb_train_\d\.bin'",
        ),
    ],
)
def test_a_shard_that_vanishes_or_shrinks_is_named(action, said, tmp_path):
    own = write_dataset(tmp_path / "set")
    outcome = run_ranks(
        "train_gpt", cli_env(own, **SAVED), tmp_path, f"{action} train_gpt.train_step 5 0"
    )
    note(
        {"cut_shards": "shards cut to 1,100 bytes"}.get(action, "shards removed"),
        "between two steps",
        outcome,
    )
    assert outcome.codes == [2, 2]
    lines = [outcome.errors(rank)[0] for rank in (0, 1)]
    assert all(
        re.fullmatch(said + r"|error: rank \d lost another rank: .*", line) for line in lines
    )
    assert any(re.fullmatch(said, line) for line in lines)
    assert outcome.files == ["run.step00000003.npz", "run.txt"]


def test_a_clock_that_goes_back_ends_the_run(dataset, tmp_path):
    fault = "clock_back train_gpt.train_step 5 0"
    outcome = run_ranks("train_gpt", cli_env(dataset, **SAVED), tmp_path, fault, world_size=1)
    note("monotonic clock goes back 10,000 s", "a step", outcome)
    assert outcome.codes == [2]
    assert re.fullmatch(
        r"error: the clock went back by \d+\.\d s at step 5: stopped\n", outcome.err[0]
    )
    assert outcome.files == ["run.step00000003.npz", "run.txt"]


def test_a_clock_that_jumps_ahead_ends_a_timed_run_as_its_cap_does(dataset, tmp_path):
    env = cli_env(dataset, **SAVED, MAX_WALLCLOCK_SECONDS=1000, GPTQ_RESERVE_SECONDS=900)
    outcome = run_ranks("train_gpt", env, tmp_path, "clock_ahead train_gpt.train_step 5 1")
    note("monotonic clock of rank 1 jumps 10,000 s ahead", "a step", outcome)
    assert (outcome.codes, outcome.err) == ([0, 0], ["", ""])
    assert re.search(
        r"^stopping_early: wallclock_cap train_time:10000\d\d\dms step:5/8$",
        outcome.out[0],
        re.MULTILINE,
    )
    assert outcome.files == ["run.ptz", "run.step00000003.npz", "run.step00000005.npz", "run.txt"]
    assert_readable(tmp_path / "logs")


def test_a_date_that_is_set_back_changes_nothing(dataset, trained, tmp_path):
    fault = "date_back train_gpt.train_step 5 0"
    outcome = run_ranks("train_gpt", cli_env(dataset, **SAVED), tmp_path, fault, world_size=1)
    note("date set back by 30 years", "a step", outcome)
    assert (outcome.codes, outcome.err) == ([0], [""])
    assert outcome.files == files_in(trained / "logs")
    assert (tmp_path / "logs" / "run.ptz").read_bytes() == (
        trained / "logs" / "run.ptz"
    ).read_bytes()


def test_an_exporter_that_runs_out_of_memory_says_so(dataset, tmp_path):
    env = cli_env(dataset, **SAVED, MODEL_DIM=256, SHARED_DIM=512, GPTQ_BATCHES=0)
    outcome = run_ranks("train_gpt", env, tmp_path, "forbid_memory train_gpt.export 1 0")
    note("no more memory (RLIMIT_AS)", "export", outcome)
    assert outcome.codes == [2, 2], outcome.err
    assert re.match("error: out of memory: .", outcome.errors(0)[0])
    assert "Traceback" not in outcome.err[0]
    assert outcome.files == ["run.step00000006.npz", "run.step00000008.npz", "run.txt"]
    assert_readable(tmp_path / "logs")


# ---- Other runs, and folders


def wait_for(path: Path, seconds: float = 60) -> None:
    until = time.perf_counter() + seconds
    while not path.exists():
        assert time.perf_counter() < until, path
        time.sleep(0.01)


@contextlib.contextmanager
def faulty(
    env: dict[str, str], fault: str, folder: Path, *launcher: str
) -> Iterator[subprocess.Popen]:
    """A training with a fault in its own process, or under a launcher; killed in the end if it is not over."""
    command = [sys.executable, *launcher, str(ROOT / "tests" / "helpers_faults.py"), "train_gpt"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "data", "tests"))
    environment = full_environment(env) | {"FAULT": fault, "PYTHONPATH": paths}
    process = subprocess.Popen(
        command, env=environment, cwd=folder, start_new_session=True, **pipes
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_runs_in_one_folder_leave_each_others_files_alone(dataset, trained, tmp_path):
    """The first is held in its fifth step while runs of its name are refused and one of another name finishes."""
    env, logs = cli_env(dataset, **SAVED), tmp_path / "logs"
    with faulty(env, "wait train_gpt.train_step 5 0", tmp_path) as first:
        wait_for(tmp_path / "reached")
        before = contents(logs)
        for knobs in ({}, {"RESUME": "auto"}, {"RUN_ID": "run.step"}):
            second = run_ranks(
                "train_gpt", {**env, **knobs}, tmp_path, "none train_gpt.fit 1 0", world_size=1
            )
            note(
                "a second run in the folder",
                f"while the first steps, {knobs or 'same RUN_ID'}",
                second,
            )
            if "RUN_ID" in knobs:
                assert second.codes == [0]
            else:
                said = "error: logs/run.txt: another run writes it; choose another RUN_ID\n"
                assert (second.codes, second.out, second.err) == ([2], [""], [said])
        assert contents(logs).items() >= before.items()
        (tmp_path / "go").touch()
        _, err = first.communicate(timeout=60)
    assert (first.returncode, err) == (0, "")
    alone = contents(trained / "logs")
    for name in ("run", "run.step"):
        own = re.compile(rf"{re.escape(name)}\.(step\d+\.npz|ptz|txt)")
        assert len([path for path in files_in(logs) if own.fullmatch(path)]) == len(alone) == 4
        assert contents(logs)[f"{name}.ptz"] == alone["run.ptz"]
    assert len(contents(logs)) == 8


def test_an_evaluation_of_what_a_run_is_about_to_replace_is_refused(dataset, trained, tmp_path):
    shutil.copytree(trained / "logs", tmp_path / "logs")
    for checkpoint in (tmp_path / "logs").glob("*.npz"):
        checkpoint.unlink()
    with faulty(cli_env(dataset, ITERATIONS=8), "wait train_gpt.train_step 5 0", tmp_path) as first:
        wait_for(tmp_path / "reached")
        none = "none train_gpt.fit 1 0"
        outcome = run_ranks(
            "eval_sliding", eval_env(dataset), tmp_path, none, "logs/run.ptz", world_size=1
        )
        assert (outcome.codes, outcome.out) == ([2], [""])
        (tmp_path / "go").touch()
        first.communicate(timeout=60)
    assert first.returncode == 0


def test_runs_without_a_name_that_start_together_get_names_of_their_own(dataset, tmp_path):
    env = cli_env(dataset, ITERATIONS=2, RUN_ID=None)
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(faulty(env, "none train_gpt.fit 1 0", tmp_path)) for _ in range(3)
        ]
        assert [(run.communicate(timeout=100)[1], run.returncode) for run in runs] == [("", 0)] * 3
    names = files_in(tmp_path / "logs")
    assert len(names) == 6
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d{6}\.\d{3}\.(ptz|txt)", name) for name in names)


@pytest.mark.parametrize("obstacle", ["a file", "a read-only disk"])
def test_a_log_folder_that_cannot_be_written_is_named_before_anything_is_done(
    obstacle, dataset, tmp_path
):
    if obstacle == "a file":
        (tmp_path / "logs").touch()
    with (
        mounted_logs(tmp_path, "ro") if obstacle == "a read-only disk" else contextlib.nullcontext()
    ):
        outcome = run_ranks("train_gpt", cli_env(dataset), tmp_path, "none train_gpt.fit 1 0")
    note("log folder not writable", obstacle, outcome)
    assert outcome.codes == [2, 2]
    reason = r"error: \[Errno \d+\] (File exists|Not a directory|Read-only file system): 'logs.*'"
    assert re.fullmatch(reason, outcome.errors(0)[0])
    assert outcome.files == []
    assert outcome.seconds < 60


# ---- Under torchrun


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_under_torchrun_a_killed_rank_ends_all_in_a_minute(dataset, tmp_path):
    started = time.perf_counter()
    with faulty(
        cli_env(dataset, **SAVED), "kill train_gpt.train_step 5 1", tmp_path, *TORCHRUN
    ) as run:
        out, err = run.communicate(timeout=60)
    outcome = Outcome(
        [run.returncode], [out], [err], time.perf_counter() - started, files_in(tmp_path / "logs")
    )
    note("rank 1 killed (SIGKILL)", "a step, under torchrun", outcome)
    assert run.returncode == 1
    assert re.search(
        r"^error: (rank 0 lost another rank: .*|interrupted by signal 15)$", err, re.MULTILINE
    )
    assert "Signal 9 (SIGKILL)" in err
    assert {"run.step00000003.npz", "run.txt"} <= set(outcome.files)
    assert_readable(tmp_path / "logs")


def test_sigterm_to_torchrun_lets_the_ranks_save(dataset, tmp_path):
    with faulty(
        cli_env(dataset, **SAVED), "wait train_gpt.train_step 5 0", tmp_path, *TORCHRUN
    ) as run:
        wait_for(tmp_path / "reached")
        run.terminate()
        threading.Timer(1.0, (tmp_path / "go").touch).start()
        out, err = run.communicate(timeout=60)
    assert run.returncode != 0
    assert err.count("error: interrupted by signal 15") == 2, err
    assert "interrupted after step 5, CHECKPOINT_EVERY=3" in out
    assert "run.step00000005.npz" in files_in(tmp_path / "logs")
    assert_readable(tmp_path / "logs")

"""Cycles of training, export and scoring leave nothing behind, in this process.

SOAK_SECONDS=1200 pytest -m soak tests/test_soak.py    repeats them for so long
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_cli import Dataset, assert_refused, cli_env, eval_env, run_in_process, write_dataset

import eval_sliding
import train_gpt

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts by /proc")

SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "120"))
WARM_UP = 6  # cycles; caches of torch and of the allocator grow in the first ones
MAX_GROWTH = 16 << 20  # bytes
FORMS = (
    {"ROUTING": "learned", "MU": "pid"},
    {"DTYPE": "bfloat16", "DISPATCH": "grouped", "MU": "full", "CHECKPOINT_EVERY": 2},
)
TTT = {"TTT": "sgd", "TTT_CHUNK_TOKENS": 16, "TTT_EPOCHS": 1}


@dataclass(frozen=True)
class Sample:
    """What this process holds after a cycle."""

    rss: int  # bytes
    handles: int
    threads: int
    files: int  # that a cycle should not have left in its folder


def take_sample(folder: Path) -> Sample:
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = sum(path.is_file() for path in folder.rglob("*"))
    return Sample(rss, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), files)


def assert_flat(samples: list[Sample]) -> None:
    """Check that after the warm-up only memory changes, and grows by at most MAX_GROWTH."""
    steady = samples[WARM_UP:]
    assert len(steady) >= 2, f"{len(samples)} cycles are too few"
    assert len({sample.handles for sample in steady}) == 1, "handles"
    assert len({sample.threads for sample in steady}) == 1, "threads"
    assert len({sample.files for sample in steady}) == 1, "files"
    tenth = max(1, len(steady) // 10)
    first = min(sample.rss for sample in steady[:tenth])
    last = min(sample.rss for sample in steady[-tenth:])
    assert last - first <= MAX_GROWTH, f"memory: {first / 2**20:.1f} to {last / 2**20:.1f} MiB"


def cycle(number: int, dataset: Dataset, folder: Path, losses: dict) -> None:
    """Train in one of the forms, score in three ways, and fail; no cycle may change a loss."""
    form = FORMS[number % len(FORMS)]
    runs = [run_in_process(train_gpt.main, cli_env(dataset, **form), folder)]
    knobs = {"DTYPE": form.get("DTYPE", "float32")}
    for argv, more in (((), {}), ((), TTT), (("--audit",), TTT)):
        env = eval_env(dataset, **knobs, **more)
        runs.append(run_in_process(eval_sliding.main, env, folder, *argv, "logs/run.ptz"))
    for kind, result in enumerate(runs):
        assert result.code == 0, result.err
        if kind < 3:
            place = (kind, number % len(FORMS))
            assert (
                losses.setdefault(place, result.summary["val_loss"]) == result.summary["val_loss"]
            )
    for path in (folder / "logs").glob("run.*"):
        path.unlink()
    absurd = cli_env(dataset, **{**form, "MATRIX_LR": 1e30, "EMBED_LR": 1e30})
    assert_refused(run_in_process(train_gpt.main, absurd, folder), " at step ")
    for path in (folder / "logs").glob("run.*"):  # no temporary file, as those begin with a dot
        path.unlink()


@pytest.mark.slow
@pytest.mark.soak
def test_cycles_of_training_and_scoring_leave_memory_handles_and_results_flat(tmp_path):
    dataset = write_dataset(tmp_path / "set", val_docs=2)
    folder = tmp_path / "run"
    folder.mkdir()
    samples, losses, started = [], {}, time.perf_counter()
    while time.perf_counter() - started < SOAK_SECONDS:
        cycle(len(samples), dataset, folder, losses)
        samples.append(take_sample(folder))
    assert_flat(samples)


def open_handle(folder: Path, kept: list) -> None:
    kept.append(open(folder.parent / "leaked.txt", "a"))  # noqa: SIM115


def keep_memory(folder: Path, kept: list) -> None:
    kept.append(b"x" * (8 << 20))


def leave_file(folder: Path, kept: list) -> None:
    (folder / f"{len(list(folder.iterdir()))}.tmp").touch()


@pytest.mark.parametrize(
    ("leak", "said"), [(open_handle, "handles"), (keep_memory, "memory"), (leave_file, "files")]
)
def test_what_a_cycle_leaves_behind_is_noticed(leak: Callable, said: str, tmp_path):
    folder, kept = tmp_path / "run", []
    folder.mkdir()
    flat = [take_sample(folder) for _ in range(12)]
    assert_flat(flat)
    samples = []
    for _ in range(12):
        leak(folder, kept)
        samples.append(take_sample(folder))
    with pytest.raises(AssertionError, match=said):
        assert_flat(samples)
    for each in kept:
        if not isinstance(each, bytes):
            each.close()

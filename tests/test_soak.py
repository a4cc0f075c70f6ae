"""Cycles of training, export and scoring leave nothing behind, in this process.

SOAK_SECONDS=1200 pytest -m soak tests/test_soak.py    repeats them for so long
"""

import os
import time
from pathlib import Path

import pytest
from helpers_cli import Dataset, assert_refused, cli_env, run_in_process, score, train

import train_gpt

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts by /proc")

SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "120"))
WARM_UP = 6  # cycles; caches of torch and of the allocator grow in the first ones
MAX_GROWTH = 16 << 20  # bytes
FORMS = (
    {"ROUTING": "learned", "MU": "pid", "DTYPE": "float32"},
    {"DTYPE": "bfloat16", "DISPATCH": "grouped", "MU": "full", "CHECKPOINT_EVERY": 2},
)
TTT = {"TTT": "sgd", "TTT_CHUNK_TOKENS": 16, "TTT_EPOCHS": 1}


def held(folder: Path) -> dict[str, int]:
    """Return what this process holds: bytes of memory, and numbers of handles, threads, files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(list(folder.rglob("*"))),
    }


def assert_flat(samples: list[dict[str, int]]) -> None:
    """Check that after the warm-up only memory changes, and grows by at most MAX_GROWTH."""
    steady = samples[WARM_UP:]
    assert len(steady) >= 2, f"{len(samples)} cycles are too few"
    for name in ("handles", "threads", "files"):
        assert len({sample[name] for sample in steady}) == 1, name
    tenth = max(1, len(steady) // 10)
    first = min(sample["memory"] for sample in steady[:tenth])
    last = min(sample["memory"] for sample in steady[-tenth:])
    assert last - first <= MAX_GROWTH, f"memory: {first / 2**20:.1f} to {last / 2**20:.1f} MiB"


def cycle(form: dict[str, object], dataset: Dataset, folder: Path) -> list[float]:
    """Train, score in two ways, audit, and fail. Returns the losses, which no cycle may change."""
    run = train(folder, dataset, **form)
    results = [run.result]
    for knobs in ({}, TTT):
        results.append(score(run.artifact, dataset, DTYPE=form["DTYPE"], **knobs))
    assert score(run.artifact, dataset, "--audit", **TTT).code == 0
    for path in (folder / "logs").glob("run.*"):
        path.unlink()
    absurd = cli_env(dataset, **{**form, "MATRIX_LR": 1e30, "EMBED_LR": 1e30})
    assert_refused(run_in_process(train_gpt.main, absurd, folder), " at step ")
    for path in (folder / "logs").glob("run.*"):  # no temporary file, as those begin with a dot
        path.unlink()
    return [result.summary["val_loss"] for result in results]


@pytest.mark.slow
@pytest.mark.soak
def test_cycles_of_training_and_scoring_leave_memory_handles_and_results_flat(dataset, tmp_path):
    samples, losses = [], []
    started = time.perf_counter()
    while time.perf_counter() - started < SOAK_SECONDS:
        losses.append(cycle(FORMS[len(losses) % 2], dataset, tmp_path / "run"))
        assert losses[-1] == losses[(len(losses) - 1) % 2]
        time.sleep(0.5)  # threads that report progress end a moment after their stage
        samples.append(held(tmp_path / "run"))
    assert_flat(samples)


def test_memory_that_every_cycle_keeps_is_noticed(tmp_path):
    assert_flat([held(tmp_path) for _ in range(12)])
    leaks, samples = [], []
    for _ in range(12):
        leaks.append(b"x" * (8 << 20))
        samples.append(held(tmp_path))
    with pytest.raises(AssertionError, match="memory"):
        assert_flat(samples)

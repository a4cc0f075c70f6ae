"""Cycles of training, export and scoring leave nothing behind.   SOAK_SECONDS=1200 pytest -m soak tests/test_soak.py

The long run is left out unless -m asks for it; the cycles it repeats, and what it would notice, are tested always.
"""

import itertools
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from helpers_cli import Dataset, assert_refused, cli_env, eval_env, run_in_process, write_dataset

import eval_sliding
import train_gpt

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="counts by Linux's /proc"
)

SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "1200"))
WARM_UP = 24  # cycles, each kind twice; caches of torch and of the allocator grow in the first ones
MAX_GROWTH = 16 << 20  # bytes
FORMS = (
    {},
    {"ROUTING": "learned", "TOP_K": 2, "MU": "pid", "CODEC": "brotli"},
    {"DTYPE": "bfloat16", "DISPATCH": "grouped", "MU": "lowrank", "CHECKPOINT_EVERY": 2},
)
TTT = {"TTT": "sgd", "TTT_SEGMENTS": 2, "TTT_CHUNK_TOKENS": 64, "TTT_EPOCHS": 1}


@dataclass(frozen=True)
class Sample:
    """What this process holds after a cycle."""

    rss: int  # bytes
    handles: int
    threads: int
    files: int  # that a cycle should not have left in its folder

    @classmethod
    def take(cls, folder: Path) -> "Sample":
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        handles, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
        return cls(rss, handles, threads, sum(path.is_file() for path in folder.rglob("*")))


def open_files() -> Counter:
    """What the open handles are of."""
    targets = Counter()
    for handle in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{handle}"
        if os.path.lexists(path):  # the one that listed the folder is closed by now
            targets[os.readlink(path)] += 1
    return targets


def ends(samples: list[Sample], warm_up: int) -> tuple[float, float]:
    """Median RSS of the first and of the last tenth of the cycles after the warm-up, bytes."""
    rss = [sample.rss for sample in samples[warm_up:]]
    tenth = max(1, len(rss) // 10)
    return statistics.median(rss[:tenth]), statistics.median(rss[-tenth:])


def assert_flat(
    samples: list[Sample], warm_up: int = WARM_UP, max_growth: int = MAX_GROWTH
) -> None:
    """Handles, threads and files never change after the warm-up, and memory grows by at most `max_growth` bytes."""
    assert len(samples) >= warm_up + 2, f"{len(samples)} cycles are too few"
    for kind in ("handles", "threads", "files"):
        found = sorted({getattr(sample, kind) for sample in samples[warm_up:]})
        assert len(found) == 1, f"{kind}: {found}; open now: {open_files()}"
    first, last = ends(samples, warm_up)
    assert last - first <= max_growth, f"memory: {first / 2**20:.1f} to {last / 2**20:.1f} MiB"


def repeat(cycle: Callable[[int], object], folder: Path, go_on: Iterator[bool]) -> list[Sample]:
    """A sample after each cycle, for as long as `go_on` says so; a cycle gets its number."""
    samples = []
    for number in itertools.takewhile(lambda _: next(go_on), itertools.count()):
        cycle(number)
        samples.append(Sample.take(folder))
    return samples


class Cycles:
    """Train, export and score in turn in every form; TTT, the audit and refused runs now and then."""

    def __init__(self, dataset: Dataset, folder: Path):
        self.dataset, self.folder, self.scores = dataset, folder, {}

    def score(self, kind: str, form: int, env: dict, *argv: str) -> None:
        result = run_in_process(
            eval_sliding.main, eval_env(self.dataset, **env), self.folder, *argv, "logs/run.ptz"
        )
        assert result.code == 0, result.err
        if not argv:
            self.keep(kind, form, result.summary["val_loss"])

    def keep(self, kind: str, form: int, loss: float) -> None:
        """A loss that no earlier cycle may change."""
        assert self.scores.setdefault((kind, form), loss) == loss, (
            f"{kind} of form {form} depends on earlier cycles"
        )

    def __call__(self, number: int) -> None:
        turn, form = divmod(number, len(FORMS))
        result = run_in_process(train_gpt.main, cli_env(self.dataset, **FORMS[form]), self.folder)
        assert result.code == 0, result.err
        self.keep("train", form, result.summary["val_loss"])
        dtype = {"DTYPE": FORMS[form].get("DTYPE", "float32")}
        self.score("slide", form, dtype)
        if turn % 2 == 0:
            self.score("ttt", form, {**dtype, **TTT})
        if turn % 4 == 1:
            self.score("audit", form, {**dtype, **TTT}, "--audit")
        if turn % 4 == 3:
            self.refused(form)
        for path in (self.folder / "logs").glob(
            "run.*"
        ):  # no temporary file, as those begin with a dot
            path.unlink()

    def refused(self, form: int) -> None:
        """Runs that fail where files and memory are in use: amid training, and reading a damaged artifact."""
        artifact = self.folder / "logs" / "run.ptz"
        artifact.write_bytes(artifact.read_bytes()[:-100])
        damaged = run_in_process(
            eval_sliding.main, eval_env(self.dataset), self.folder, "logs/run.ptz"
        )
        assert_refused(damaged, "checksum does not match")
        goes_on = {
            "RESUME": "auto",
            "ITERATIONS": 12,
        }  # from a checkpoint, in the form that has some
        absurd = cli_env(
            self.dataset, **{**FORMS[form], **goes_on, "MATRIX_LR": 1e30, "EMBED_LR": 1e30}
        )
        assert_refused(run_in_process(train_gpt.main, absurd, self.folder), "stopped")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", val_docs=2)


@pytest.mark.soak
def test_cycles_of_training_and_scoring_leave_memory_and_handles_flat(dataset, tmp_path, capsys):
    started = time.perf_counter()

    def in_time() -> Iterator[bool]:
        while time.perf_counter() - started < SOAK_SECONDS:
            yield True
        yield False

    cycles = Cycles(dataset, tmp_path)
    samples = repeat(cycles, tmp_path, in_time())
    first, last = ends(samples, min(WARM_UP, len(samples) - 1))
    with capsys.disabled():
        print(
            f"\nsoak: {len(samples)} cycles in {time.perf_counter() - started:.0f} s, the first {WARM_UP} to warm up"
        )
        print(
            f"RSS, medians of the first and last tenth: {first / 2**20:.1f} and {last / 2**20:.1f} MiB"
        )
        for number in sorted(
            {0, min(WARM_UP, len(samples) - 1), len(samples) // 2, len(samples) - 1}
        ):
            sample = samples[number]
            print(
                f"cycle {number}: RSS {sample.rss / 2**20:.1f} MiB, {sample.handles} handles, ",
                end="",
            )
            print(f"{sample.threads} threads, {sample.files} files left")
    assert_flat(samples)


# ---- What the soak repeats, and what it would notice


def times(count: int) -> Iterator[bool]:
    return iter([True] * count + [False])


def test_every_kind_of_cycle_runs_and_leaves_no_file(dataset, tmp_path, monkeypatch):
    """From turn to turn the kinds change, from form to form everything else."""
    monkeypatch.setattr("test_soak.FORMS", FORMS[2:])
    cycles = Cycles(dataset, tmp_path)
    samples = repeat(cycles, tmp_path, times(5))
    assert set(cycles.scores) == {("train", 0), ("slide", 0), ("ttt", 0)}
    assert_flat(samples, warm_up=2, max_growth=64 << 20)
    cycles.scores["slide", 0] += 1e-6
    with pytest.raises(AssertionError, match="slide of form 0 depends on earlier cycles"):
        cycles(4)


def leak_handle(folder: Path) -> Callable:
    return open(folder.parent / "leaked.txt", "a").close


def leak_memory(folder: Path) -> Callable:
    return partial(len, b"x" * (8 << 20))


def leak_thread(folder: Path) -> Callable:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()

    return end


def leak_file(folder: Path) -> Callable:
    handle, path = tempfile.mkstemp(".tmp", dir=folder)
    os.close(handle)
    return partial(os.unlink, path)


LEAKS = {"handles": leak_handle, "memory": leak_memory, "threads": leak_thread, "files": leak_file}


@pytest.mark.parametrize("kind", LEAKS)
def test_what_a_cycle_leaves_behind_is_noticed(tmp_path, kind):
    ends_of_leaks, folder = [], tmp_path / "run"
    folder.mkdir()
    assert_flat(repeat(lambda number: None, folder, times(12)), warm_up=2)
    try:
        samples = repeat(
            lambda number: ends_of_leaks.append(LEAKS[kind](folder)), folder, times(12)
        )
        with pytest.raises(AssertionError, match=f"^{kind}: "):
            assert_flat(samples, warm_up=2)
    finally:
        for end in ends_of_leaks:
            end()


def test_a_log_that_a_run_leaves_open_is_noticed(dataset, tmp_path, monkeypatch):
    leaked, enter = [], train_gpt.Log.__init__

    def leave_open(self, *args):
        enter(self, *args)
        leaked.append(open(self.path, "a"))  # noqa: SIM115

    monkeypatch.setattr(train_gpt.Log, "__init__", leave_open)
    try:
        samples = repeat(Cycles(dataset, tmp_path), tmp_path, times(3))
        with pytest.raises(AssertionError, match=r"^handles: .*logs/run\.txt"):
            assert_flat(samples, warm_up=1)
    finally:
        for file in leaked:
            file.close()


def flat_samples(count: int, slope: float = 0.0) -> list[Sample]:
    """Memory that goes up and down by 4 MiB in every three cycles, and up by `slope` MiB a cycle."""
    return [Sample(int((300 + 2 * (i % 3) + slope * i) * 2**20), 9, 3, 0) for i in range(count)]


def test_memory_may_go_up_and_down_but_not_only_up():
    assert_flat(flat_samples(400))
    assert_flat(flat_samples(400, slope=0.04))
    with pytest.raises(AssertionError, match=r"^memory: 30\d\.\d to 3[34]\d\.\d MiB"):
        assert_flat(flat_samples(400, slope=0.1))
    with pytest.raises(AssertionError, match="too few"):
        assert_flat(flat_samples(WARM_UP + 1))


@pytest.mark.parametrize("at", [WARM_UP + 1, 399])
@pytest.mark.parametrize("kind", ["handles", "threads", "files"])
def test_a_single_handle_thread_or_file_more_is_noticed_after_the_warm_up_alone(kind, at):
    samples = flat_samples(400)
    more = partial(lambda sample, **change: Sample(**{**vars(sample), **change}), samples[at])
    changed = [*samples[:at], more(**{kind: vars(samples[at])[kind] + 1}), *samples[at + 1 :]]
    with pytest.raises(AssertionError, match=f"^{kind}: "):
        assert_flat(changed)
    assert_flat([*changed[at : at + 1] * WARM_UP, *samples[WARM_UP:]])

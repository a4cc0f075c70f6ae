"""Faults to plant in a run, and runs of several ranks that one of them befalls.   (no tests here)

FAULT="kill train_gpt.train_step 3 1" torchrun ... tests/helpers_faults.py train_gpt   kills rank 1 before its third
step, with PYTHONPATH=.:data:tests.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from helpers_cli import ALONE, full_environment

import train_gpt
from train_gpt import Hyperparameters, load_artifact


def fill_disk(*args: object) -> None:
    """Take the last byte of the file system that holds the logs."""
    with open("logs/junk", "wb", buffering=0) as junk:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while junk.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def forbid_memory(*args: object) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, used))


def every_shard(change: Callable[[Path], None]) -> Callable:
    def act(*args: object) -> None:
        for path in Path(os.environ["DATA_PATH"]).glob("fineweb_train_*.bin"):
            change(path)

    return act


def poison(model: torch.nn.Module, *args: object) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)


def turn_clock(seconds: float, clock: str) -> Callable:
    def act(*args: object) -> None:
        honest = vars(time)[clock]
        setattr(time, clock, lambda: honest() + seconds)

    return act


def wait(*args: object) -> None:
    """Say that this point is reached, and wait for leave to go on."""
    Path("reached").touch()
    while not Path("go").exists():
        time.sleep(0.01)


ACTIONS = {
    "kill": lambda *args: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda *args: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda *args: os.kill(os.getpid(), signal.SIGINT),
    "poison": poison,
    "fill_disk": fill_disk,
    "forbid_memory": forbid_memory,
    "cut_shards": every_shard(lambda path: os.truncate(path, 1100)),
    "remove_shards": every_shard(os.unlink),
    "clock_back": turn_clock(-1e4, "perf_counter"),
    "clock_ahead": turn_clock(1e4, "perf_counter"),
    "date_back": turn_clock(-1e9, "time"),
    "wait": wait,
    "none": lambda *args: None,
}


def plant(fault: str) -> None:
    """Make a fault, "ACTION MODULE.FUNCTION CALL RANK", happen right before that call, if this is the rank."""
    action, function, call, rank = fault.split()
    if int(os.environ.get("RANK", "0")) != int(rank):
        return
    module, *path, name = function.split(".")
    owner, calls = importlib.import_module(module), itertools.count(1)
    for attribute in path:
        owner = vars(owner)[attribute]
    honest = vars(owner)[name]

    def faulty(*args, **kwargs):
        if next(calls) == int(call):
            ACTIONS[action](*args)
        return honest(*args, **kwargs)

    setattr(owner, name, faulty)


@dataclass(frozen=True)
class Outcome:
    """What became of a run: by rank the exit status and what was printed; the seconds; the files of its log folder."""

    codes: list[int]
    out: list[str]
    err: list[str]
    seconds: float
    files: list[str]

    def errors(self, rank: int) -> list[str]:
        return [line for line in self.err[rank].splitlines() if line.startswith("error: ")]


def be_rank(
    script: str, argv: tuple[str, ...], env: dict[str, str], folder: Path, fault: str
) -> None:
    """Run a script of the repository as the command line does, in this process, which ends with it."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(
            os.open(
                folder / f"rank{env.get('RANK', 0)}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC
            ),
            stream,
        )
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1) for stream in (1, 2))  # noqa: SIM115
    sys.argv = [f"{script}.py", *argv]
    torch.set_num_threads(1)
    plant(fault)
    train_gpt.run_entry_point(importlib.import_module(script).main)


def run_ranks(
    script: str,
    env: dict[str, str],
    folder: Path,
    fault: str,
    *argv: str,
    world_size: int = 2,
    limit: float = 60,
) -> Outcome:
    """Run a script on so many ranks without a launcher, so that they have to notice a fault themselves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "pytest", "sentencepiece"])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        place = {
            "WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": listener.getsockname()[1],
        }
    envs = [
        full_environment(env) | {k: str(v) for k, v in place.items()} for _ in range(world_size)
    ]
    for rank, each in enumerate(envs):
        each |= (
            {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {"WORLD_SIZE": "1"}
        )
    ranks = [
        context.Process(target=be_rank, args=(script, argv, each, folder, fault)) for each in envs
    ]
    started = time.perf_counter()
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(max(0.0, started + limit - time.perf_counter()))
    seconds, hung = (
        time.perf_counter() - started,
        [rank for rank, process in enumerate(ranks) if process.is_alive()],
    )
    for process in ranks:
        process.kill()
        process.join()
    printed = [
        [(folder / f"rank{rank}.{name}").read_text() for rank in range(world_size)]
        for name in ("out", "err")
    ]
    assert not hung, (hung, printed)
    return Outcome(
        [process.exitcode for process in ranks], *printed, seconds, files_in(folder / "logs")
    )


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def assert_readable(folder: Path) -> None:
    """Every file under a final name is whole."""
    for path in folder.iterdir():
        if path.suffix == ".ptz":
            load_artifact(path, Hyperparameters(eval_stride=8), ALONE.device)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                assert all(file[name].size for name in file.files)
        else:
            assert path.suffix == ".txt" or path.name.endswith(".tmp"), path
            assert path.suffix != ".txt" or path.read_text(encoding="utf-8").endswith("\n")


def note(fault: str, where: str, outcome: Outcome) -> None:
    """A row for the file that FAULT_TABLE names: the fault, and what became of the run."""
    if "FAULT_TABLE" in os.environ:
        lines = [(outcome.errors(rank) or [""])[-1] for rank in range(len(outcome.codes))]
        row = (
            fault,
            where,
            " / ".join(dict.fromkeys(filter(None, lines))),
            outcome.codes,
            ", ".join(outcome.files),
        )
        with open(os.environ["FAULT_TABLE"], "a", encoding="utf-8") as file:
            file.write(json.dumps([*map(str, row), f"{outcome.seconds:.1f} s"]) + "\n")


if __name__ == "__main__":
    plant(os.environ["FAULT"])
    name = sys.argv.pop(1)
    train_gpt.run_entry_point(importlib.import_module(name).main)

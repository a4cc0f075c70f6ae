"""Faults to plant in a run, and runs of several ranks that one of them befalls.

FAULT="kill train_gpt.train_step 3 1" torchrun ... tests/helpers_faults.py train_gpt   kills rank 1
before its third step, with PYTHONPATH=.:data:tests.
"""

import contextlib
import errno
import importlib
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers_cli import ALONE, full_environment, without_progress

import train_gpt

NO_FAULT = "kill train_gpt.train_step 1000000 0"


def kill(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def term(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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


def cut_shards(*args: object) -> None:
    for path in Path(os.environ["DATA_PATH"]).glob("fineweb_train_*.bin"):
        os.truncate(path, 1100)


def remove_shards(*args: object) -> None:
    for path in Path(os.environ["DATA_PATH"]).glob("fineweb_train_*.bin"):
        path.unlink()


def poison(model: torch.nn.Module, *args: object) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)


def turn_clock(seconds: float) -> None:
    honest = time.perf_counter
    time.perf_counter = lambda: honest() + seconds


def clock_back(*args: object) -> None:
    turn_clock(-1e4)


def clock_ahead(*args: object) -> None:
    turn_clock(1e4)


def wait(*args: object) -> None:
    """Say that this point is reached, and wait for leave to go on."""
    Path("reached").touch()
    while not Path("go").exists():
        time.sleep(0.01)


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """Plant "ACTION MODULE.FUNCTION CALL RANK": the action right before that call on that rank."""
    action, function, call, rank = fault.split()
    module, *path, name = function.split(".")
    owner, calls = importlib.import_module(module), itertools.count(1)
    for attribute in path:
        owner = vars(owner)[attribute]
    honest, perf_counter = vars(owner)[name], time.perf_counter

    def faulty(*args, **kwargs):
        if next(calls) == int(call) and os.environ.get("RANK", "0") == rank:
            globals()[action](*args)
        return honest(*args, **kwargs)

    setattr(owner, name, faulty)
    try:
        yield
    finally:
        setattr(owner, name, honest)
        time.perf_counter = perf_counter


@dataclass(frozen=True)
class Outcome:
    """What became of a run: by rank exit status and output; seconds; files of its log folder."""

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
    """Run a script as the command line does, in this process, which ends with it."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"rank{env['RANK']}.{name}", flags), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1) for stream in (1, 2))  # noqa: SIM115
    sys.argv = [f"{script}.py", *argv]
    torch.set_num_threads(1)
    with planted(fault):
        train_gpt.run_entry_point(importlib.import_module(script).main)


def run_ranks(
    script: str,
    env: dict[str, str],
    folder: Path,
    fault: str = NO_FAULT,
    *argv: str,
    world_size: int = 2,
) -> Outcome:
    """Run a script on so many ranks, no launcher, so that they notice a fault themselves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "sentencepiece", "helpers_faults"])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(world_size):
        of_rank = full_environment(env) | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(context.Process(target=be_rank, args=(script, argv, of_rank, folder, fault)))
    started = time.perf_counter()
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(max(0.0, started + 100 - time.perf_counter()))
    seconds = time.perf_counter() - started
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    out = [(folder / f"rank{rank}.out").read_text() for rank in range(world_size)]
    err = [(folder / f"rank{rank}.err").read_text() for rank in range(world_size)]
    err = [without_progress(text) for text in err]
    assert not hung, (hung, out, err)
    codes = [process.exitcode for process in ranks]
    return Outcome(codes, out, err, seconds, files_in(folder / "logs"))


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def assert_readable(folder: Path) -> None:
    """Check that every file under a final name is whole."""
    for path in folder.iterdir():
        if path.suffix == ".ptz":
            train_gpt.load_artifact(path, train_gpt.Hyperparameters(), ALONE.device)
        elif path.suffix == ".pt":
            assert torch.load(path, weights_only=True)["model"]
        elif path.suffix == ".txt":
            assert path.read_text(encoding="utf-8").endswith("\n")
        else:
            assert path.name.endswith(".tmp"), path


if __name__ == "__main__":
    name = sys.argv.pop(1)
    with planted(os.environ["FAULT"]):
        train_gpt.run_entry_point(importlib.import_module(name).main)

"""Faults to plant in a run, and runs of several ranks that one of them befalls.

FAULT="kill train_gpt.train_step 3 1" torchrun ... tests/helpers_faults.py train_gpt   kills rank 1
before its third step, with PYTHONPATH=.:data:tests.
"""

import contextlib
import importlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers_cli import ALONE, ROOT, full_environment, without_progress

import train_gpt

NO_FAULT = "kill train_gpt.train_step 1000000 0"
SENT = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}


def fill_disk(*args: object) -> None:
    """Take the last page of the file system that holds the logs."""
    with contextlib.suppress(OSError), open("logs/junk", "wb", buffering=0) as junk:
        while True:
            junk.write(bytes(4096))


def cut_shards(*args: object) -> None:
    for path in Path(os.environ["DATA_PATH"]).glob("fineweb_train_*.bin"):
        os.truncate(path, 1100)


def clock_back(*args: object) -> None:
    honest = time.perf_counter
    time.perf_counter = lambda: honest() - 1e4


def no_memory(*args: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def wait(*args: object) -> None:
    """Say that this point is reached, and wait for leave to go on."""
    Path("reached").touch()
    while not Path("go").exists():
        time.sleep(0.01)


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """Plant "ACTION MODULE.FUNCTION CALL RANK": the action right before that call on that rank.

    It is one of the functions above, or a signal that this process gets.
    """
    action, function, call, rank = fault.split()
    module, *path, name = function.split(".")
    owner, calls = importlib.import_module(module), itertools.count(1)
    for attribute in path:
        owner = vars(owner)[attribute]
    honest, perf_counter = vars(owner)[name], time.perf_counter

    def faulty(*args, **kwargs):
        if next(calls) == int(call) and os.environ.get("RANK", "0") == rank:
            if action in SENT:
                os.kill(os.getpid(), SENT[action])
            else:
                globals()[action](*args)
        return honest(*args, **kwargs)

    setattr(owner, name, faulty)
    try:
        yield
    finally:
        setattr(owner, name, honest)
        time.perf_counter = perf_counter


def start(
    script: str, env: dict[str, str], folder: Path, fault: str, launcher: tuple = ()
) -> subprocess.Popen:
    """Start a script with a fault in a process group of its own, or under a launcher."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "data", "tests"))
    env = full_environment(env) | {"FAULT": fault, "PYTHONPATH": paths}
    command = [sys.executable, *launcher, __file__, script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=folder, start_new_session=True, **pipes)


@dataclass(frozen=True)
class Outcome:
    """What became of a run: by rank exit status and output; files of its log folder."""

    codes: list[int]
    out: list[str]
    err: list[str]
    files: list[str]


def run_ranks(
    script: str, env: dict[str, str], folder: Path, fault: str = NO_FAULT, world_size: int = 2
) -> Outcome:
    """Run a script on so many ranks, no launcher, so that they notice a fault themselves."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(world_size):
        of_rank = env | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start(script, of_rank, folder, fault))
    try:
        printed = [process.communicate(timeout=100) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    codes = [process.returncode for process in ranks]
    out = [out for out, _ in printed]
    err = [without_progress(err) for _, err in printed]
    return Outcome(codes, out, err, files_in(folder / "logs"))


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

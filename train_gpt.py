"""Stub of the shared foundation; the rest of the trainer is being written around it."""
import os
import sys
import time
from pathlib import Path

import numpy as np

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256  # layout of the challenge's .bin files


class Refusal(Exception):
    """Bad input from the user, a file or the machine; entry points print it as one line and exit with status 2."""


class Progress:
    """One updating line with ETA on a terminal; silent elsewhere, so that log files stay clean."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.started, self.shown = label, total, time.perf_counter(), 0.0

    def update(self, done: int, note: str = "") -> None:
        """Redraw at most five times a second; `done` counts in the unit of `total`."""
        now = time.perf_counter()
        if not sys.stderr.isatty() or (now - self.shown < 0.2 and done < self.total):
            return
        self.shown = now
        eta = (now - self.started) * (self.total - done) / max(done, 1)
        line = f"{self.label} {done:,}/{self.total:,} ({done / max(self.total, 1):.0%}) ETA {eta:.0f}s {note}"
        print(f"\r{line[:118]:<118}", end="\n" if done >= self.total else "", file=sys.stderr, flush=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync, rename: `path` either keeps its old content or holds all of `data`. Raises Refusal when it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Refusal(f"cannot write {path}: {error.strerror}") from error


def load_data_shard(path: Path) -> np.ndarray:
    """Memory-map one shard after checking every header field and the length. Returns (count,) uint16; raises Refusal."""
    expected = SHARD_HEADER_INTS * 4
    size = path.stat().st_size
    if size < expected:
        raise Refusal(f"{path}: {size} bytes is shorter than the {expected}-byte shard header")
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise Refusal(f"{path}: shard magic/version {header[0]}/{header[1]}, expected {SHARD_MAGIC}/{SHARD_VERSION}")
    if header[2] < 0 or size != expected + 2 * int(header[2]):
        raise Refusal(f"{path}: header says {header[2]} tokens, but the file has {size} bytes instead of {expected + 2 * int(header[2])}")
    return np.memmap(path, dtype="<u2", mode="r", offset=expected, shape=(int(header[2]),))


def run_entry_point(main) -> None:
    """Call `main()`; a Refusal becomes one line on stderr and exit status 2 instead of a traceback."""
    try:
        main()
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)

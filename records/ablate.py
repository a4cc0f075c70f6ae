"""Run a grid of settings over seeds, each a training and its evaluation, and compare the cells.

    python records/ablate.py grid.txt --out study --seeds 1 2 3 --model-bytes 1000000

One line of GRID is one cell; the first cell is the control:

    base     ITERATIONS=1000 MAX_WALLCLOCK_SECONDS=0           # for all cells, as often as needed
    dense    ROUTING=dense
    zipf     ROUTING=zipf
    swiglu   ROUTING=zipf ACTIVATION=swiglu SOLVE=off          # SOLVE overrides --solve for a cell

Paths in GRID are relative to it. Knobs of the caller's environment do not count, except DATA_PATH
and TOKENIZER_PATH. Every cell but the control gets the SHARED_DIM whose estimated artifact is
nearest to the control's in bytes.

The same command again runs what is missing or has failed, and nothing twice. --out gets the
scripts, a finished log per run, logs/ (artifacts, and what unfinished runs wrote and printed) and
table.md.
Exit status: 1 if a run has failed or model bytes differ by more than 1 % from the control's.
"""

import argparse
import bisect
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from common import ROOT, ArgumentParser, markdown_table, optional
from runlog import RunLog

from eval_sliding import EvalConfig
from train_gpt import (
    GPT,
    LOADER_BYTES,
    ConfigError,
    Hyperparameters,
    build_expert_table,
    dry_run,
    knob_fields,
    pack_source,
    require,
    run_entry_point,
    write_atomically,
)

TOLERANCE = 0.01  # of the control's model bytes
SOLVES = ("SHARED_DIM", "off")  # what makes bytes equal, or nothing does
MAX_WIDTH = 65_536
PATHS = ("DATA_PATH", "TOKENIZER_PATH")
KNOBS = {name.upper() for cls in (Hyperparameters, EvalConfig) for name in knob_fields(cls)}


# ---- Grid ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One line of the grid, with the knobs that its runs get."""

    name: str
    where: str  # file and line
    solve: str  # of SOLVES
    knobs: dict[str, str]

    def hyperparameters(self, **more: object) -> Hyperparameters:
        """Return the cell's knobs and `more`, checked. Raises ConfigError naming the line."""
        texts = {name: str(value) for name, value in more.items()}
        try:
            EvalConfig.from_env(self.knobs)
            return Hyperparameters.from_env(self.knobs | texts)
        except ConfigError as error:
            raise ConfigError(f"{self.where}: cell {self.name}: {error}") from error


def read_lines(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, dict[str, str]]]]:
    """Return the settings for all cells and, by cell, its line and settings. Raises ConfigError."""
    base = {}
    rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path} line {number}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        if not words:
            continue

        name = words[0]
        good = re.fullmatch(r"[A-Za-z0-9_.+-]+", name) is not None
        require(good, f"{where}: {name!r}: letters, digits and . _ + - name a cell")
        require(name not in rows, f"{where}: there is a cell {name} already")
        knobs = {}
        if name == "base":
            knobs = base
        else:
            rows[name] = (where, knobs)
        for setting in words[1:]:
            key, equals, value = setting.partition("=")
            good = equals == "=" and re.fullmatch("[A-Z_][A-Z0-9_]*", key) is not None
            require(good, f"{where}: {setting!r}: expected KEY=VALUE")
            require(key not in ("SEED", "RUN_ID"), f"{where}: {key} is not a cell's to set")
            require(key not in knobs, f"{where}: {key} is set twice")
            knobs[key] = value
    require(len(rows) > 0, f"{path}: no cells")
    return base, rows


def read_grid(path: Path, solve: str) -> list[Cell]:
    """Return the cells in order, with absolute paths. Raises ConfigError naming the line."""
    base, rows = read_lines(path)
    folder = path.absolute().parent
    caller = {key: os.path.abspath(os.environ[key]) for key in PATHS if os.environ.get(key)}
    cells = []
    for name, (where, own) in rows.items():
        knobs = caller | base | own
        width = knobs.pop("SOLVE", solve)
        require(width in SOLVES, f"{where}: SOLVE={width}: expected {' or '.join(SOLVES)}")
        if not cells:
            message = f"{where}: SOLVE in the control, which sets the bytes"
            require(own.get("SOLVE", "off") == "off", message)
            width = "off"
        unknown = " ".join(sorted(knobs.keys() - KNOBS))
        require(not unknown, f"{where}: cell {name}: {unknown}: not a knob of either script")

        for key in PATHS:
            missing = f"{where}: cell {name} has no {key}; set it in the grid or the environment"
            require(bool(knobs.get(key)), missing)
            knobs[key] = os.path.abspath(folder / knobs[key])
        cells.append(Cell(name, where, width, knobs))
        cells[-1].hyperparameters()
    return cells


# ---- Equal bytes ---------------------------------------------------------------------------------


def estimate(cell: Cell, **more: object) -> int:
    """Return the bytes of the artifact to come, at the cell's own k."""
    hp = cell.hyperparameters(**more, TARGET_BYTES=0)
    model = GPT(hp.model)
    # Counts like a text's, for the bytes of the table depend on how it is made.
    counts = (1_000_000 / (np.arange(hp.model.vocab_size) + 3.7)).astype(np.int64)
    model.expert_table.copy_(build_expert_table(hp.model, counts))
    return len(dry_run(hp, model).artifact)


def nearest_width(size: Callable[[int], int], start: int, goal: int) -> int:
    """Return the width whose `size`, which grows with it, is nearest to `goal`."""
    high = start
    while high < MAX_WIDTH and size(high) < goal:
        high *= 2
    widths = range(1, min(high, MAX_WIDTH) + 1)
    above = bisect.bisect_left(widths, goal, key=size)
    neighbours = widths[max(above - 1, 0) : above + 1]
    return min(neighbours, key=lambda width: abs(size(width) - goal))


def solve(cell: Cell, goal: int) -> int:
    """Return the SHARED_DIM for `goal` bytes. Raises ConfigError when none is near enough."""

    @functools.cache
    def size(width: int) -> int:
        return estimate(cell, SHARED_DIM=width)

    width = nearest_width(size, cell.hyperparameters().model.shared_dim, goal)
    gives = f"SHARED_DIM={width} gives {size(width):,} bytes, the control has {goal:,}"
    message = f"{cell.where}: cell {cell.name}: {gives}"
    require(abs(size(width) - goal) <= TOLERANCE * goal, message)
    return width


def settle(cells: list[Cell], out: Path) -> list[Cell]:
    """Return the cells with the widths that make their bytes equal. Raises ConfigError.

    A cell that has run already keeps its width; check_logs() compares everything else.
    """
    settled, goal = [], 0
    for cell in cells:
        if cell.solve != "off":
            made = [events_of(log).get("ablation") for log in files_of(out, cell).values()]
            width = made[0]["knobs"].get(cell.solve) if made and made[0] else None
            if width is None:
                goal = goal or estimate(cells[0])
                width = solve(cell, goal)
                print(f"{cell.name}: {cell.solve}={width} for {goal:,} bytes", flush=True)
            cell = replace(cell, knobs=cell.knobs | {cell.solve: str(width)})
        settled.append(cell)
    return settled


# ---- Logs ----------------------------------------------------------------------------------------


def events_of(log: Path) -> dict[str, dict]:
    """Return the JSON lines of a log, the last of each event; none without a log."""
    return RunLog.read(log).json_events if log.exists() else {}


def row_of(log: Path, score: str) -> dict:
    """Return the figures of a run by their names. Raises ConfigError when it has not ended."""
    events = events_of(log)
    scored = "eval_summary" if score == "sliding" else "train_summary"
    for name in ("train_summary", scored):
        require(name in events, f"{log.name} has no {name}")
        require(not events[name].get("partial"), f"{name} is PARTIAL")
    exact = events[scored].get("ngram") or events[scored]
    row = events["train_summary"] | {"val_bpb": exact["val_bpb"]}
    return row | {"tok_per_s": row["tokens"] / max(row["train_seconds"], 1e-9)}


def files_of(folder: Path, cell: Cell, suffix: str = ".txt") -> dict[int, Path]:
    """Return the files <cell>_seed<seed><suffix> of a folder, by seed in order."""
    found = {}
    for path in folder.glob(f"{cell.name}_seed*{suffix}"):
        seed = path.name.removeprefix(f"{cell.name}_seed").removesuffix(suffix)
        if seed.isdigit():
            found[int(seed)] = path
    return dict(sorted(found.items()))


def check_logs(out: Path, cells: list[Cell], fixed: dict[str, str]) -> None:
    """Raise ConfigError when a log was made otherwise than the grid would have it now.

    `fixed` is what the closing lines of all logs of a study share: score and scripts.
    """
    for cell in cells:
        for seed, path in files_of(out, cell).items():
            made = events_of(path).get("ablation")
            require(made is not None, f"{path}: has no closing line of ablate.py")
            old = {key: made.get(key) for key in (*fixed, "cell", "seed")} | made["knobs"]
            new = fixed | {"cell": cell.name, "seed": seed} | cell.knobs
            for key in sorted(old.keys() | new.keys()):
                both = f"{key}={old.get(key)}, now it is {new.get(key)}"
                message = f"{path} was made with {both}: use another --out"
                require(old.get(key) == new.get(key), message)


# ---- Runs ----------------------------------------------------------------------------------------


def shares_of_cores(jobs: int) -> list[list[int]]:
    """Return the cores of each job: equally many, and none of another's while there are enough."""
    cores = list(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    return np.resize(cores, (jobs, max(1, len(cores) // jobs))).tolist()  # which repeats them


class Run:
    """The training and evaluation of a cell with a seed, in a child process."""

    def __init__(self, out: Path, cell: Cell, seed: int, fixed: dict, cores: list, lock: int):
        """Start. The child inherits `lock`: the study's folder is taken while it lives."""
        self.out, self.cell, self.seed, self.fixed, self.cores = out, cell, seed, fixed, cores
        name = f"{cell.name}_seed{seed}"
        self.log = out / "logs" / f"{name}.txt"
        self.printed = self.log.with_suffix(".out")
        for old in self.log.parent.glob(f"{name}.*"):
            old.unlink()
        foreign = KNOBS | {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
        env = {key: value for key, value in os.environ.items() if key not in foreign}
        env |= {"OMP_NUM_THREADS": str(len(cores)), **cell.knobs}
        env |= {"SEED": str(seed), "RUN_ID": name}
        script = '"$0" train_gpt.py'
        if fixed["score"] == "sliding":
            script += f' && exec "$0" eval_sliding.py logs/{name}.ptz'
        pin = None  # where a platform cannot keep a process on its own cores
        if hasattr(os, "sched_setaffinity"):
            pin = functools.partial(os.sched_setaffinity, 0, cores)
        with open(self.printed, "wb") as printed:
            self.child = subprocess.Popen(
                ["sh", "-c", script, sys.executable],
                cwd=out,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
                preexec_fn=pin,
            )

    def finish(self) -> str:
        """File the log of a run that has ended. Returns its score, or why there is none."""
        status = self.child.returncode
        try:
            words = self.printed.read_text(errors="replace").strip() or f"exit status {status}"
            require(status == 0, words.splitlines()[-1])
            row = row_of(self.log, self.fixed["score"])
        except ConfigError as error:
            return f"FAILED: {error}"
        # The log in its place says that the run is done. The script stands beside it.
        body = self.log.read_bytes().replace((self.out / "train_gpt.py").read_bytes(), b"")
        last = {"event": "ablation", "cell": self.cell.name, "seed": self.seed, **self.fixed}
        last |= {"knobs": self.cell.knobs, "threads": len(self.cores)}
        write_atomically(self.out / self.log.name, body + json.dumps(last).encode() + b"\n")
        self.log.unlink()
        self.printed.unlink()
        return f"{row['val_bpb']:.4f}"


def run_all(out: Path, cells: list[Cell], todo: list, fixed: dict, jobs: int, lock: int) -> None:
    """Run pairs of cell and seed, `jobs` at a time, and bring the table up to date after each."""
    started = time.perf_counter()
    waiting, free, running = list(todo), shares_of_cores(jobs), []
    try:
        while waiting or running:
            while waiting and free:
                cell, seed = waiting.pop(0)
                running.append(Run(out, cell, seed, fixed, free.pop(), lock))
            ended = [run for run in running if run.child.poll() is not None]
            for run in ended:
                running.remove(run)
                free.append(run.cores)
                said = f"{run.cell.name} seed {run.seed}: {run.finish()}"
                write_table(out, cells)
                done = len(todo) - len(waiting) - len(running)
                left = (time.perf_counter() - started) / done * (len(todo) - done) / 60
                print(f"{done}/{len(todo)} {said}, {left:.0f} min left", flush=True)
            time.sleep(0 if ended else 0.1)
    finally:
        for run in running:
            if run.child.returncode is None:
                os.killpg(run.child.pid, signal.SIGKILL)
                run.child.wait()


# ---- Table ---------------------------------------------------------------------------------------


@dataclass
class Row:
    """A cell's runs and its mean minus the control's, bpb."""

    cell: Cell
    runs: dict[int, dict]  # by seed
    note: str = ""  # why there is no comparison
    delta: float | None = None
    half: float | None = None  # half-width of the 95 % confidence interval
    p: float | None = None  # of Welch's test

    @property
    def scores(self) -> list[float]:
        return [run["val_bpb"] for run in self.runs.values()]

    def mean(self, column: str) -> float:
        return statistics.fmean(run[column] for run in self.runs.values())


def pooled_deviation(groups: list[list[float]]) -> tuple[float, int]:
    """Return the standard deviation about the means of groups, and its degrees of freedom.

    With two or three seeds a cell's own would be of no use, and what seeds do to a model of one
    size differs little from cell to cell.
    """
    groups = [group for group in groups if group]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum((x - statistics.fmean(group)) ** 2 for group in groups for x in group)
    return math.sqrt(squares / freedom) if freedom else math.nan, freedom


def half_width(deviation: float, freedom: int, n: int, control: int) -> float:
    """Return that of the 95 % interval of the difference of means of n and `control` values."""
    quantile = optional("scipy.stats").t.ppf(0.975, freedom)
    return quantile * deviation * math.sqrt(1 / n + 1 / control)


def compare(out: Path, cells: list[Cell]) -> list[Row]:
    """Return a row per cell from the logs in `out`. Raises ConfigError."""
    rows = []
    for cell in cells:
        runs = {}
        for seed, log in files_of(out, cell).items():
            runs[seed] = row_of(log, events_of(log)["ablation"]["score"])
        rows.append(Row(cell, runs))

    control = rows[0]
    deviation, freedom = pooled_deviation([row.scores for row in rows])
    for row in rows:
        left = len(files_of(out / "logs", row.cell, ".out").keys() - row.runs.keys())
        if left:
            row.note = f"unfinished for {left} of {left + len(row.runs)} seeds"
        elif row.runs and control.runs:
            off = abs(row.mean("bytes_model") / control.mean("bytes_model") - 1)
            if off > TOLERANCE:
                row.note = f"bytes differ by {100 * off:.1f} %"
        if row is control or row.note or not row.runs or not control.runs:
            continue
        mine, others = row.scores, control.scores
        row.delta = row.mean("val_bpb") - control.mean("val_bpb")
        if freedom:
            row.half = half_width(deviation, freedom, len(mine), len(others))
        if min(len(mine), len(others)) > 1 and len({*mine}) + len({*others}) > 2:
            row.p = optional("scipy.stats").ttest_ind(mine, others, equal_var=False).pvalue
    return rows


def resolution(rows: list[Row]) -> str:
    """Return what differences the study can see, in words."""
    control = rows[0].runs
    deviation, freedom = pooled_deviation([row.scores for row in rows])
    n = len(control)
    if not freedom or not n:
        return "Resolution: unknown; it takes two seeds of a cell, and the control."
    half = half_width(deviation, freedom, n, n)
    text = f"Resolution: 95 % CI of +-{half:.4f} bpb for a cell with the control's n = {n}; "
    text += f"standard deviation of seeds, pooled over cells: {deviation:.4f} (freedom {freedom})"
    pairs = []
    for row in rows[1:]:
        both = row.runs.keys() & control.keys()
        pairs.append([row.runs[seed]["val_bpb"] - control[seed]["val_bpb"] for seed in both])
    paired, freedom = pooled_deviation(pairs)
    if freedom:
        text += f"; of differences of the same seed: {paired:.4f}"
    return f"{text}."


def table(rows: list[Row]) -> str:
    """Return the Markdown table with the study's resolution below it."""
    head = "cell|solved width|params|model bytes|tok/s|n|float mean|mean|std|delta|95 % CI|Welch p"
    means = {"params": ",.0f", "bytes_model": ",.0f", "tok_per_s": ",.0f"}
    means |= {"val_bpb_float": ".4f", "val_bpb": ".4f"}
    lines = []
    for row in rows:
        width = std = delta = interval = p = "-"
        if row.runs and row.cell.solve != "off":
            width = f"{row.cell.solve}={row.cell.knobs[row.cell.solve]}"
        shown = ["-" if not row.runs else format(row.mean(name), means[name]) for name in means]
        if len(row.runs) > 1:
            std = f"{statistics.stdev(row.scores):.4f}"
        if row.delta is not None:
            delta = f"{row.delta:+.4f}"
        if row.half is not None:
            interval = f"{row.delta - row.half:+.4f} to {row.delta + row.half:+.4f}"
        if row.p is not None:
            p = "<0.0001" if row.p < 1e-4 else f"{row.p:.4f}"
        delta = row.note or ("control" if row is rows[0] else delta)
        line = [row.cell.name, width, *shown[:3], len(row.runs), *shown[3:]]
        lines.append([*line, std, delta, interval, p])
    return f"{markdown_table(head.split('|'), lines)}\n\n{resolution(rows)}\n"


def write_table(out: Path, cells: list[Cell]) -> bool:
    """Write table.md. Returns whether every cell can be compared."""
    rows = compare(out, cells)
    write_atomically(out / "table.md", table(rows).encode())
    return not any(row.note for row in rows)


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises ConfigError; exits with 0 after --help."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("grid", type=Path, metavar="GRID")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the study")
    add("--seeds", type=int, nargs="+", required=True, metavar="SEED")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, each on its own cores")
    add("--solve", choices=SOLVES, default=SOLVES[0], help="what makes bytes equal")
    add("--model-bytes", type=int, metavar="N", help="TARGET_BYTES = N + the bytes of the code")
    add("--score", choices=("sliding", "artifact"), default="sliding", help="val_bpb that counts")
    args = parser.parse_args()
    require(args.jobs > 0 and min(args.seeds) >= 0, "--jobs and --seeds: expected positive numbers")
    return args


@contextlib.contextmanager
def sole_runner(out: Path) -> Iterator[int]:
    """Hold the folder's lock and yield its descriptor. Raises ConfigError when it is held."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{out}: another ablate.py, or a run it left behind, is at work there"
            raise ConfigError(message) from None
        yield lock.fileno()


def main() -> None:
    """Plan, check, run and report; exits with 1 if not every cell can be compared."""
    args = parse_arguments()
    cells = read_grid(args.grid, args.solve)
    optional("scipy.stats")  # better now than after the first run
    train = (ROOT / "train_gpt.py").read_bytes()
    evaluation = (ROOT / "eval_sliding.py").read_bytes()
    more = {}
    if args.model_bytes is not None:
        code_bytes = LOADER_BYTES + len(pack_source(train + b"\0" + evaluation))
        more["TARGET_BYTES"] = str(args.model_bytes + code_bytes)

    out = args.out.absolute()
    fixed = {"score": args.score}
    fixed["script_sha256"] = hashlib.sha256(train).hexdigest()
    fixed["eval_sha256"] = hashlib.sha256(evaluation).hexdigest()
    with sole_runner(out) as lock:
        cells = [replace(cell, knobs=cell.knobs | more) for cell in settle(cells, out)]
        for cell in cells:
            cell.hyperparameters()
        check_logs(out, cells, fixed)

        # Seed by seed, so that a study that is cut short has something of every cell.
        asked = [(cell, seed) for seed in dict.fromkeys(args.seeds) for cell in cells]
        todo = [(cell, seed) for cell, seed in asked if seed not in files_of(out, cell)]
        if args.jobs > 1 and any(cell.hyperparameters().max_wallclock_seconds for cell in cells):
            print("warning: runs that seconds cap share the machine", file=sys.stderr)
        write_atomically(out / "train_gpt.py", train)
        write_atomically(out / "eval_sliding.py", evaluation)
        (out / "logs").mkdir(exist_ok=True)
        run_all(out, cells, todo, fixed, args.jobs, lock)
        comparable = write_table(out, cells)
    print((out / "table.md").read_text())
    sys.exit(0 if comparable else 1)


if __name__ == "__main__":
    run_entry_point(main)

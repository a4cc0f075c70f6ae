"""Run a grid of settings over seeds, each a training and its evaluation, and compare the cells.

    python records/ablate.py grid.txt --out study --seeds 1 2 3 --model-bytes 1000000
    python records/ablate.py grid.txt --out study --seeds 1 2 3 --dry-run    # widths, bytes, runs

One line of GRID is one cell; the first cell is the control:

    base     ITERATIONS=1000 MAX_WALLCLOCK_SECONDS=0           # for all cells, as often as needed
    dense    ROUTING=dense
    zipf     ROUTING=zipf
    swiglu   ROUTING=zipf ACTIVATION=swiglu SOLVE=EXPERT_DIM   # SOLVE overrides --solve for a cell

Paths in GRID are relative to it. Knobs of the caller's environment do not count, except DATA_PATH
and TOKENIZER_PATH. Every cell but the control gets the integer width (--solve) whose estimated
artifact is nearest to the control's in bytes.

The same command again runs what is missing or has failed, and nothing twice. --out gets a log per
run, artifacts/, failed/ (what failing runs printed), sources/ (the script, by the SHA-256 that ends
each log), results.csv, table.md and plot.png.
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
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from common import ROOT, ArgumentParser, figure_png, markdown_table, optional
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
WIDTHS = ("SHARED_DIM", "EXPERT_DIM")
MAX_WIDTH = 65_536
PATHS = ("DATA_PATH", "TOKENIZER_PATH")
KNOBS = {name.upper() for cls in (Hyperparameters, EvalConfig) for name in knob_fields(cls)}
COLUMNS = ("val_bpb", "val_bpb_float", "bytes_model", "params", "tokens", "steps", "train_seconds")


# ---- Grid ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One line of the grid, with the knobs that its runs get."""

    name: str
    where: str  # file and line
    solve: str  # the knob that makes bytes equal, or off
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
        expected = f"{where}: SOLVE={width}: expected {', '.join(WIDTHS)} or off"
        require(width in (*WIDTHS, "off"), expected)
        if not cells:
            message = f"{where}: SOLVE in the control, which sets the bytes"
            require(own.get("SOLVE", "off") == "off", message)
            width = "off"
        unknown = " ".join(sorted(knobs.keys() - KNOBS))
        require(not unknown, f"{where}: cell {name}: {unknown}: not a knob of train_gpt.py")

        for key in PATHS:
            missing = f"{where}: cell {name} has no {key}; set it in the grid or the environment"
            require(bool(knobs.get(key)), missing)
            knobs[key] = os.path.abspath(folder / knobs[key])
        cells.append(Cell(name, where, width, knobs))
        cells[-1].hyperparameters()
    return cells


# ---- Equal bytes ---------------------------------------------------------------------------------


def estimate(cell: Cell, **more: object) -> tuple[int, int]:
    """Return the bytes of the artifact to come, at the cell's own k, and its parameters."""
    hp = cell.hyperparameters(**more, TARGET_BYTES=0)
    model = GPT(hp.model)
    # Counts like a text's, for the bytes of the table depend on how it is made.
    counts = (1_000_000 / (np.arange(hp.model.vocab_size) + 3.7)).astype(np.int64)
    model.expert_table.copy_(build_expert_table(hp.model, counts))
    return len(dry_run(hp, model).artifact), sum(p.numel() for p in model.parameters())


def nearest_width(size: Callable[[int], int], start: int, goal: int, step: int = 1) -> int:
    """Return the multiple of `step` whose `size`, which grows with it, is nearest to `goal`."""
    high = max(start // step, 1) * step
    while high < MAX_WIDTH and size(high) < goal:
        high *= 2
    widths = range(step, min(high, MAX_WIDTH) + 1, step)
    above = bisect.bisect_left(widths, goal, key=size)
    neighbours = widths[max(above - 1, 0) : above + 1]
    return min(neighbours, key=lambda width: abs(size(width) - goal))


def solve(cell: Cell, goal: int) -> dict[str, int]:
    """Return bytes and parameters of a cell and, unless off, the width for `goal` bytes."""
    if cell.solve == "off":
        size, params = estimate(cell)
        return {"bytes": size, "params": params}

    @functools.cache
    def estimate_width(width: int) -> tuple[int, int]:
        return estimate(cell, **{cell.solve: width})

    model = cell.hyperparameters().model
    start, step = model.shared_dim, 1
    if cell.solve == "EXPERT_DIM":
        start, step = model.expert_dim, 1 if model.has_router or model.dispatch == "masked" else 8
    width = nearest_width(lambda width: estimate_width(width)[0], start, goal, step)
    size, params = estimate_width(width)
    return {"width": width, "bytes": size, "params": params}


def settle(cells: list[Cell], out: Path, script: bytes) -> dict[str, dict]:
    """Return bytes, params and the solved width by cell, kept in widths.json.

    Raises ConfigError for a cell that no width brings within TOLERANCE of the control.
    """
    path = out / "widths.json"
    cache = json.loads(path.read_text()) if path.exists() else {}
    settled = {}
    goal = 0
    for cell in cells:
        inputs = [cell.solve, cell.knobs, cells[0].knobs, hashlib.sha256(script).hexdigest()]
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        if key not in cache:
            cache[key] = solve(cell, goal)
            write_atomically(path, json.dumps(cache, indent=1).encode())
        found = cache[key]
        settled[cell.name] = found
        goal = goal or found["bytes"]  # of the control, which is the first
        if cell.solve != "off":
            nearest = f"{cell.solve}={found['width']} gives {found['bytes']:,} bytes"
            message = f"{cell.where}: cell {cell.name}: {nearest}, {cells[0].name} has {goal:,}"
            require(abs(found["bytes"] - goal) <= TOLERANCE * goal, message)
    return settled


# ---- Logs ----------------------------------------------------------------------------------------


def events_of(log: Path) -> dict[str, dict]:
    """Return the JSON lines of a log, the last of each event; none without a log."""
    return RunLog.read(log).json_events if log.exists() else {}


def row_of(log: Path, score: str) -> dict[str, float]:
    """Return a run's COLUMNS and tokens per second. Raises ConfigError when one is missing."""
    events = events_of(log)
    scored = "eval_summary" if score == "sliding" else "train_summary"
    for name in ("train_summary", scored):
        require(name in events, f"{log.name} has no {name}")
        require(not events[name].get("partial"), f"{name} is PARTIAL")
    summary = events["train_summary"] | {"val_bpb": events[scored].get("val_bpb")}
    row = {}
    for name in COLUMNS:
        value = summary.get(name)
        good = type(value) in (int, float) and math.isfinite(value)
        require(good, f"{log.name}: {name} is {value}")
        row[name] = value
    row["tok_per_s"] = row["tokens"] / max(row["train_seconds"], 1e-9)
    return row


def files_of(folder: Path, cell: Cell) -> dict[int, Path]:
    """Return the files <cell>_seed<seed>.txt of a folder, by seed in order."""
    found = {}
    for path in folder.glob("*_seed*.txt"):
        match = re.fullmatch(rf"{re.escape(cell.name)}_seed(\d+)\.txt", path.name)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Study:
    """A folder of runs, the scripts as they were at the start, and the score that counts."""

    out: Path
    score: str  # sliding | artifact
    train: bytes
    evaluation: bytes
    threads: int  # of each run

    def closing_line(self, cell: Cell, seed: int) -> dict[str, object]:
        """Return what ends the log of a run: everything that decides its figures."""
        return {
            "event": "ablation",
            "cell": cell.name,
            "seed": seed,
            "score": self.score,
            "knobs": cell.knobs,
            "script_sha256": hashlib.sha256(self.train).hexdigest(),
            "eval_sha256": hashlib.sha256(self.evaluation).hexdigest(),
        }

    def check_logs(self, cells: list[Cell]) -> None:
        """Raise ConfigError when a log was made otherwise than the grid would have it now."""
        for cell in cells:
            for seed, path in files_of(self.out, cell).items():
                made = events_of(path).get("ablation")
                require(made is not None, f"{path}: has no closing line of ablate.py")
                old = made | made["knobs"]
                new = self.closing_line(cell, seed) | cell.knobs
                for key in sorted((old | new).keys() - {"knobs", "threads"}):
                    both = f"{key}={old.get(key)}, now it is {new.get(key)}"
                    message = f"{path} was made with {both}: use another --out"
                    require(old.get(key) == new.get(key), message)


# ---- Runs ----------------------------------------------------------------------------------------


class Runner:
    """Runs cells in child processes, each in a work folder of its own."""

    def __init__(self, study: Study, lock: int):
        self.study = study
        self.lock = lock  # descriptor that children inherit: the folder is taken while one lives
        self.children = set()
        self.stopped = threading.Event()

    def stop(self) -> None:
        """Kill every child, and let no further one start."""
        self.stopped.set()
        for child in list(self.children):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def call(self, work: Path, cell: Cell, seed: int, *argv: str) -> None:
        """Run a script to its end. Raises ConfigError with its last words if it fails."""
        foreign = KNOBS | {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
        env = {name: value for name, value in os.environ.items() if name not in foreign}
        env |= {"OMP_NUM_THREADS": str(self.study.threads), **cell.knobs}
        env |= {"SEED": str(seed), "RUN_ID": work.name}
        with open(work / "printed.txt", "a+b") as printed:
            child = subprocess.Popen(
                [sys.executable, *argv],
                cwd=work,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self.lock,),
            )
            self.children.add(child)
            if self.stopped.is_set():
                self.stop()
            status = child.wait()
            self.children.discard(child)
            printed.seek(0)
            lines = printed.read().decode(errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        require(status == 0, words[-1] if words else f"exit status {status}")

    def run(self, cell: Cell, seed: int) -> str:
        """Train and score; file log and artifact, or what a failed run printed. Returns words."""
        out = self.study.out
        name = f"{cell.name}_seed{seed}"
        started = time.perf_counter()
        work = out / ".work" / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / "train_gpt.py").write_bytes(self.study.train)
        (work / "eval_sliding.py").write_bytes(self.study.evaluation)
        log = work / "logs" / f"{name}.txt"
        failed = out / "failed" / log.name
        try:
            self.call(work, cell, seed, "train_gpt.py")
            if self.study.score == "sliding":
                self.call(work, cell, seed, "eval_sliding.py", f"logs/{name}.ptz")
            row = row_of(log, self.study.score)
            (out / "artifacts").mkdir(exist_ok=True)
            os.replace(log.with_suffix(".ptz"), out / "artifacts" / f"{name}.ptz")
        except (ConfigError, OSError, ValueError) as error:
            if self.stopped.is_set():
                return "stopped"
            printed = (work / "printed.txt").read_bytes()
            write_atomically(failed, printed + f"\nablate.py: {error}\n".encode())
            said = f"FAILED: {error}"
        else:
            # The log comes last, as it says that the run is done. sources/ has the script.
            body = log.read_bytes().replace(self.study.train, b"")
            last = self.study.closing_line(cell, seed) | {"threads": self.study.threads}
            write_atomically(out / log.name, body + json.dumps(last).encode() + b"\n")
            failed.unlink(missing_ok=True)
            said = f"{row['val_bpb']:.4f}"
        shutil.rmtree(work)
        return f"{said} ({time.perf_counter() - started:.0f} s)"

    def run_all(self, cells: list[Cell], todo: list[tuple[Cell, int]], jobs: int) -> None:
        """Run what is to do, `jobs` at a time, and bring the table up to date after each."""
        started = time.perf_counter()
        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(self.run, cell, seed): (cell, seed) for cell, seed in todo}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    cell, seed = futures[future]
                    text = future.result()
                    write_outputs(self.study.out, cells)
                    left = (time.perf_counter() - started) / done * (len(todo) - done) / 60
                    name = f"{done}/{len(todo)} {cell.name} seed {seed}"
                    print(f"{name}: {text}, {left:.0f} min left", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise


# ---- Table ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A cell's runs and its mean minus the control's, bpb."""

    cell: Cell
    runs: dict[int, dict]  # by seed
    note: str = ""  # why there is no comparison
    delta: float | None = None
    half: float | None = None  # half-width of the 95 % confidence interval
    p: float | None = None  # of Welch's test

    def mean(self, column: str) -> float:
        return sum(run[column] for run in self.runs.values()) / len(self.runs)


def scores_of(rows: list[Row]):
    """Return a pandas frame of val_bpb, seeds x cells."""
    scores = {}
    for row in rows:
        scores[row.cell.name] = {seed: run["val_bpb"] for seed, run in row.runs.items()}
    return optional("pandas").DataFrame(scores, dtype=float)


def pooled_deviation(scores) -> tuple[float, int]:
    """Return the standard deviation about the means of columns, and its degrees of freedom.

    With two or three seeds a cell's own would be of no use, and what seeds do to a model of one
    size differs little from cell to cell.
    """
    freedom = int((scores.count() - 1).clip(lower=0).sum())
    squares = ((scores - scores.mean()) ** 2).sum().sum()
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
        row = Row(cell, runs)
        control = rows[0] if rows else row
        failed = len(files_of(out / "failed", cell).keys() - runs.keys())
        if failed:
            row = replace(row, note=f"failed for {failed} of {failed + len(runs)} seeds")
        elif runs and control.runs:
            off = abs(row.mean("bytes_model") / control.mean("bytes_model") - 1)
            if off > TOLERANCE:
                row = replace(row, note=f"bytes differ by {100 * off:.1f} %")
        rows.append(row)

    scores = scores_of(rows)
    deviation, freedom = pooled_deviation(scores)
    control = scores[cells[0].name].dropna()
    compared = rows[:1]
    for row in rows[1:]:
        mine = scores[row.cell.name].dropna()
        if len(mine) and len(control) and not row.note:
            row = replace(row, delta=mine.mean() - control.mean())
            if freedom:
                row = replace(row, half=half_width(deviation, freedom, len(mine), len(control)))
            if min(len(mine), len(control)) > 1 and mine.std() + control.std() > 0:
                test = optional("scipy.stats").ttest_ind(mine, control, equal_var=False)
                row = replace(row, p=test.pvalue)
        compared.append(row)
    return compared


def resolution(rows: list[Row]) -> str:
    """Return what differences the study can see, in words."""
    scores = scores_of(rows)
    deviation, freedom = pooled_deviation(scores)
    n = len(rows[0].runs)
    if not freedom or not n:
        return "Resolution: unknown; it takes two seeds of a cell, and the control."
    half = half_width(deviation, freedom, n, n)
    text = f"Resolution: 95 % CI of +-{half:.4f} bpb for a cell with the control's n = {n}; "
    text += f"standard deviation of seeds, pooled over cells: {deviation:.4f} (freedom {freedom})"
    control = rows[0].cell.name
    paired, freedom = pooled_deviation(scores.sub(scores[control], axis=0).drop(columns=control))
    if freedom:
        text += f"; of differences of the same seed: {paired:.4f}"
    return f"{text}."


def table(rows: list[Row]) -> str:
    """Return the Markdown table with the study's resolution below it."""
    header = (
        "cell|solved width|params|model bytes|tok/s|n|float mean|mean|std|delta|95 % CI|Welch p"
    )
    scores = scores_of(rows)
    lines = []
    for row in rows:
        line = dict.fromkeys(header.split("|"), "-") | {"cell": row.cell.name, "n": len(row.runs)}
        if row.runs:
            if row.cell.solve != "off":
                line["solved width"] = f"{row.cell.solve}={row.cell.knobs[row.cell.solve]}"
            line["params"] = f"{row.mean('params'):,.0f}"
            line["model bytes"] = f"{row.mean('bytes_model'):,.0f}"
            line["tok/s"] = f"{row.mean('tok_per_s'):,.0f}"
            line["float mean"] = f"{row.mean('val_bpb_float'):.4f}"
            line["mean"] = f"{row.mean('val_bpb'):.4f}"
        if len(row.runs) > 1:
            line["std"] = f"{scores[row.cell.name].std():.4f}"
        if row.delta is not None:
            line["delta"] = f"{row.delta:+.4f}"
        if row.half is not None:
            line["95 % CI"] = f"{row.delta - row.half:+.4f} to {row.delta + row.half:+.4f}"
        if row.p is not None:
            line["Welch p"] = "<0.0001" if row.p < 1e-4 else f"{row.p:.4f}"
        if row is rows[0]:
            line["delta"] = "control"
        line["delta"] = row.note or line["delta"]
        lines.append(line.values())
    return f"{markdown_table(header.split('|'), lines)}\n\n{resolution(rows)}\n"


def plot(rows: list[Row]) -> bytes:
    """Return a PNG of the differences to the control: seeds, mean and interval."""
    others = rows[1:]
    size = (8, 1.5 + 0.4 * len(others))
    figure = optional("matplotlib.figure").Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.4", linewidth=1)
    for y, row in enumerate(others):
        if row.delta is not None:
            seeds = [run["val_bpb"] - rows[0].mean("val_bpb") for run in row.runs.values()]
            axes.plot(seeds, [y + 0.2] * len(seeds), "o", color="C0", markersize=4)
            axes.errorbar(row.delta, y, xerr=row.half, fmt="D", color="C3", markersize=6, capsize=4)
    labels = [f"{row.cell.name}\n({row.note})" if row.note else row.cell.name for row in others]
    axes.set_yticks(range(len(others)), labels)
    axes.set_ylim(max(len(others), 1) - 0.5, -0.5)
    axes.set_xlabel(f"val_bpb minus the mean of {rows[0].cell.name}: seeds, mean, 95 % CI")
    axes.grid(axis="x", alpha=0.3)
    return figure_png(figure, 120)


def write_outputs(out: Path, cells: list[Cell]) -> bool:
    """Write results.csv, table.md and plot.png. Returns whether every cell can be compared."""
    rows = compare(out, cells)
    runs = []
    for row in rows:
        for seed, run in row.runs.items():
            log = f"{row.cell.name}_seed{seed}.txt"
            runs.append({"cell": row.cell.name, "seed": seed, **run, "log": log})
    frame = optional("pandas").DataFrame(runs)
    write_atomically(out / "results.csv", frame.to_csv(index=False).encode())
    write_atomically(out / "table.md", table(rows).encode())
    write_atomically(out / "plot.png", plot(rows))
    return not any(row.note for row in rows)


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises ConfigError; exits with 0 after --help."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("grid", type=Path, metavar="GRID")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the study")
    add("--seeds", type=int, nargs="+", required=True, metavar="SEED")
    add("--only", nargs="+", metavar="CELL", help="run these cells; the table has all of them")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
    add(
        "--solve", default="SHARED_DIM", metavar="KNOB", help="makes bytes equal; off: nothing does"
    )
    add("--model-bytes", type=int, metavar="N", help="TARGET_BYTES = N + the bytes of the code")
    add("--score", choices=("sliding", "artifact"), default="sliding", help="val_bpb that counts")
    add("--dry-run", action="store_true", help="print cells, widths, bytes and runs to do")
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


def print_plan(cells: list[Cell], settled: dict[str, dict]) -> None:
    for cell in cells:
        found = settled[cell.name]
        hp = cell.hyperparameters()
        width = f" {cell.solve}={cell.knobs[cell.solve]}" if cell.solve != "off" else ""
        tokens = hp.iterations * hp.train_batch_tokens / found["params"]
        size = f"{found['bytes']:,} bytes, {found['params']:,} parameters"
        print(f"{cell.name}{width}: {size}, at most {tokens:.2f} tokens per parameter")


def main() -> None:
    """Plan, check, run and report; exits with 1 if not every cell can be compared."""
    args = parse_arguments()
    cells = read_grid(args.grid, args.solve)
    unknown = " ".join(sorted({*(args.only or ())} - {cell.name for cell in cells}))
    require(not unknown, f"--only {unknown}: no such cell in {args.grid}")
    for module in ("pandas", "scipy.stats", "matplotlib.figure"):
        optional(module)  # better now than after the first run
    train = (ROOT / "train_gpt.py").read_bytes()
    evaluation = (ROOT / "eval_sliding.py").read_bytes()
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    study = Study(args.out.absolute(), args.score, train, evaluation, threads)

    with sole_runner(study.out) as lock:
        settled = {}
        if args.dry_run or any(cell.solve != "off" for cell in cells):
            settled = settle(cells, study.out, train)
        for i, cell in enumerate(cells):
            more = {}
            if cell.solve != "off":
                more[cell.solve] = str(settled[cell.name]["width"])
            if args.model_bytes is not None:
                code_bytes = LOADER_BYTES + len(pack_source(train + b"\0" + evaluation))
                more["TARGET_BYTES"] = str(args.model_bytes + code_bytes)
            cells[i] = replace(cell, knobs=cell.knobs | more)
            cells[i].hyperparameters()
        study.check_logs(cells)

        # Seed by seed, so that a study that is cut short has something of every cell.
        chosen = [cell for cell in cells if not args.only or cell.name in args.only]
        asked = [(cell, seed) for seed in dict.fromkeys(args.seeds) for cell in chosen]
        todo = [(cell, seed) for cell, seed in asked if seed not in files_of(study.out, cell)]
        if args.dry_run:
            print_plan(cells, settled)
            print(f"{len(todo)} of {len(asked)} runs to do")
            return
        if args.jobs > 1 and any(cell.hyperparameters().max_wallclock_seconds for cell in cells):
            print("warning: runs that seconds cap share the machine", file=sys.stderr)
        digest = hashlib.sha256(train).hexdigest()
        write_atomically(study.out / "sources" / f"{digest[:12]}.py", train)
        Runner(study, lock).run_all(cells, todo, args.jobs)
        comparable = write_outputs(study.out, cells)
    print((study.out / "table.md").read_text())
    sys.exit(0 if comparable else 1)


if __name__ == "__main__":
    run_entry_point(main)

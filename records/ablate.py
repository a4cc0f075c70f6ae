"""Run a grid of settings over seeds, each a training run and its evaluation, and write a table of differences.

    python records/ablate.py grid.txt --out study --seeds 1 2 3 --model-bytes 1000000
    python records/ablate.py grid.txt --out study --seeds 1 2 3 --dry-run    # widths, bytes and runs to do

One line of GRID is one cell; the first cell is the control:

    base     DEVICE=cpu ITERATIONS=1000                        # for all cells; may occur several times
    dense    ROUTING=dense
    zipf     ROUTING=zipf
    swiglu   ROUTING=zipf ACTIVATION=swiglu SOLVE=EXPERT_DIM   # SOLVE overrides --solve for one cell
    bank     ROUTING=zipf SCRIPT=variants/bank.py              # another training script

Paths in GRID are relative to it. Knobs of the caller's environment do not count, except DATA_PATH and TOKENIZER_PATH.
Every cell but the control gets the integer width (--solve) whose estimated artifact is nearest to the control's.

A run happens in a folder of its own, in copies named train_gpt.py and eval_sliding.py; the latter is the one beside the
training script or else the repository's, which any single-file variant of train_gpt.py can use. Other scripts have to
leave logs/RUN_ID.ptz and the closing JSON lines of logs/RUN_ID.txt. The same command again runs what is missing or has
failed. --out gets a log per run, the scripts in sources/ (by the SHA-256 that ends each log), artifacts/, failed/ (what
failing runs printed), results.csv, table.md and plot.png.
Exit status: 1 if a run has failed or model bytes differ by more than 1 % from the control's, 2 after a refusal.
"""

import argparse
import ast
import contextlib
import csv
import ctypes
import fcntl
import hashlib
import importlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import runlog

from train_gpt import LOADER_BYTES, Refusal, pack_source, require, run_entry_point, write_atomically

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.01  # of the control's model bytes
WIDTHS, MAX_WIDTH = ("SHARED_DIM", "EXPERT_DIM"), 65_536
PATHS = ("DATA_PATH", "TOKENIZER_PATH")
INHERITED = r"PATH|HOME|USER|SHELL|LANG|TMPDIR|CC|CXX|VIRTUAL_ENV|(LC|LD|XDG|PYTHON|TORCH|TRITON|CU|NVIDIA|NCCL|KMP).*"
COLUMNS = ("val_bpb", "val_bpb_float", "bytes_model", "params", "tokens", "steps", "train_seconds")


# ---- Grid


@dataclass(frozen=True)
class Source:
    """A training script and its evaluation script as they were at the start, and the module with its knobs, if any."""

    path: Path
    train: bytes
    evaluation: bytes
    module: ModuleType | None = None
    knobs: frozenset[str] | None = None  # None: not known

    @classmethod
    def read(cls, path: Path) -> "Source":
        """Raises Refusal when there is no such script or it cannot be imported."""
        require(path.is_file(), f"{path}: no such script")
        beside = path.with_name("eval_sliding.py")
        train, evaluation = (
            path.read_bytes(),
            (beside if beside.is_file() else ROOT / "eval_sliding.py").read_bytes(),
        )
        try:
            classes = [
                node.name for node in ast.parse(train).body if isinstance(node, ast.ClassDef)
            ]
            if "Hyperparameters" not in classes:  # nor is it known what an import would do
                return cls(path, train, evaluation)
            spec = importlib.util.spec_from_file_location(
                f"ablated_{hashlib.sha256(train).hexdigest()}", path
            )
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            knobs = frozenset(f.name.upper() for f in fields(module.Hyperparameters))
        except Exception as error:
            raise Refusal(f"{path}: {type(error).__name__}: {error}") from error
        return cls(path, train, evaluation, module, knobs)

    @property
    def can_estimate(self) -> bool:
        return self.module is not None and {"GPT", "dry_run"} <= vars(self.module).keys()

    @property
    def hashes(self) -> dict[str, str]:
        sha256 = (hashlib.sha256(data).hexdigest() for data in (self.train, self.evaluation))
        return dict(zip(("script_sha256", "eval_sha256"), sha256, strict=True))


@dataclass(frozen=True)
class Cell:
    """One line of the grid, `where`, with the knobs that its runs get."""

    name: str
    where: str
    source: Source
    solve: str
    knobs: dict[str, str]

    def hyperparameters(self, **more: object):
        """The script's own, from the knobs and `more`. Raises Refusal."""
        try:
            return self.source.module.Hyperparameters.from_env(
                self.knobs | {k: str(v) for k, v in more.items()}
            )
        except Exception as error:  # the Refusal of another module is another class
            raise Refusal(f"{self.where}: cell {self.name}: {error}") from error


def read_lines(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, dict[str, str]]]]:
    """Settings for all cells, and by cell its place in the file and its settings. Raises Refusal."""
    base, rows = {}, {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path} line {number}"
        try:
            name, *settings = shlex.split(line, comments=True) or [""]
        except ValueError as error:
            raise Refusal(f"{where}: {error}") from error
        if not name:
            continue
        require(
            re.fullmatch(r"[A-Za-z0-9_.+-]+", name),
            f"{where}: {name!r}: letters, digits and . _ + - name a cell",
        )
        require(name not in rows, f"{where}: there is a cell {name} already")
        knobs = base if name == "base" else rows.setdefault(name, (where, {}))[1]
        for setting in settings:
            key, equals, value = setting.partition("=")
            require(
                equals and re.fullmatch("[A-Z_][A-Z0-9_]*", key),
                f"{where}: {setting!r}: expected KEY=VALUE",
            )
            require(key not in ("SEED", "RUN_ID"), f"{where}: {key} is not a cell's to set")
            require(key not in knobs, f"{where}: {key} is set twice")
            knobs[key] = value
    require(rows, f"{path}: no cells")
    return base, rows


def read_grid(path: Path, script: Path, solve: str) -> list[Cell]:
    """The cells in order, with absolute paths. Raises Refusal naming the line before any script but these is used."""
    base, rows = read_lines(path)
    cells, sources, folder = [], {}, Path(os.path.abspath(path)).parent
    caller = {key: os.path.abspath(os.environ[key]) for key in PATHS if os.environ.get(key)}
    for name, (where, own) in rows.items():
        knobs = base | own
        chosen = folder / knobs.pop("SCRIPT") if "SCRIPT" in knobs else script.absolute()
        width = knobs.pop("SOLVE", solve)
        require(
            width in (*WIDTHS, "off"),
            f"{where}: SOLVE={width}: expected {', '.join(WIDTHS)} or off",
        )
        require(
            cells or own.get("SOLVE", "off") == "off",
            f"{where}: SOLVE in the control, which sets the bytes",
        )
        source = sources[chosen] = sources.get(chosen) or Source.read(chosen)
        known = knobs.keys() | set(PATHS) if source.knobs is None else source.knobs
        unknown = sorted(knobs.keys() - known)
        require(
            not unknown, f"{where}: cell {name}: {' '.join(unknown)}: not a knob of {chosen.name}"
        )
        knobs = {key: value for key, value in caller.items() if key in known} | knobs
        knobs |= {key: os.path.abspath(folder / knobs[key]) for key in PATHS if knobs.get(key)}
        for key in (key for key in PATHS if source.knobs and key in known):
            require(
                knobs.get(key),
                f"{where}: cell {name} has no {key}; set it in the grid or in the environment",
            )
        cells.append(Cell(name, where, source, width if cells else "off", knobs))
        if source.module:
            cells[-1].hyperparameters()
    return cells


# ---- Equal bytes


def estimate(cell: Cell, **more: object) -> tuple[int, int]:
    """Bytes of the artifact to come at the grid's own k, and parameters. Raises Refusal."""
    module, hp = cell.source.module, cell.hyperparameters(**more, TARGET_BYTES=0)
    model = module.GPT(hp)
    if hasattr(model, "expert_table") and model.expert_table.numel():
        table, generator = model.expert_table, torch.Generator().manual_seed(0)
        if hp.routing in (
            "modulo",
            "learned",
            "soft",
        ):  # a pattern, which takes no bytes to speak of
            table.copy_(torch.arange(table.shape[1])[:, None] % hp.num_experts)
        else:
            table.copy_(torch.randint(hp.num_experts, table.shape, generator=generator))
    return len(module.dry_run(hp, model).artifact), sum(p.numel() for p in model.parameters())


def nearest_width(size: Callable[[int], int], start: int, goal: int, step: int = 1) -> int:
    """The multiple of `step` up to MAX_WIDTH whose `size`, which grows with it, is nearest to `goal`; tries `start`
    first."""
    low = high = max(start // step, 1)
    while low > 1 and size(low * step) > goal:
        low, high = low // 2, low
    while high < MAX_WIDTH // step and size(high * step) < goal:
        low, high = high, min(2 * high, MAX_WIDTH // step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle * step) <= goal else (low, middle)
    return step * min(low, high, key=lambda units: abs(size(units * step) - goal))


def solve(cell: Cell, goal: int) -> dict[str, int]:
    """The width of a cell for `goal` bytes, with its bytes and parameters. Raises Refusal."""
    sizes: dict[int, tuple[int, int]] = {}

    def size(width: int) -> int:
        if width not in sizes:
            sizes[width] = estimate(cell, **{cell.solve: width})
        return sizes[width][0]

    hp = cell.hyperparameters()
    grouped = cell.solve == "EXPERT_DIM" and cell.knobs.get("DISPATCH") == "grouped"
    start = hp.shared_dim if cell.solve == "SHARED_DIM" else hp.expert_dim
    width = nearest_width(size, start, goal, step=8 if grouped else 1)
    return {"width": width, "bytes": size(width), "params": sizes[width][1]}


def settle(cells: list[Cell], out: Path) -> dict[str, dict]:
    """Estimates by cell: bytes, params and, unless SOLVE=off, the width; kept in widths.json. Raises Refusal."""
    path, control = out / "widths.json", cells[0]
    cache, settled = json.loads(path.read_text()) if path.exists() else {}, {}
    for cell in cells:
        for source in (control.source, cell.source) if cell.solve != "off" else ():
            needs = f"SOLVE={cell.solve} needs Hyperparameters, GPT and dry_run in {source.path}; or SOLVE=off"
            require(source.can_estimate, f"{cell.where}: cell {cell.name}: {needs}")
        if not cell.source.can_estimate:
            continue
        versions = [[part.knobs, part.source.hashes["script_sha256"]] for part in (cell, control)]
        key = hashlib.sha256(
            json.dumps([cell.solve, *versions], sort_keys=True).encode()
        ).hexdigest()
        if cache.get(cell.name, {}).get("key") != key:
            if cell.solve == "off":
                found = dict(zip(("bytes", "params"), estimate(cell), strict=True))
            else:
                found = solve(cell, settled[control.name]["bytes"])
            cache[cell.name] = {"key": key} | found
            write_atomically(path, json.dumps(cache, indent=1).encode())
        found = settled[cell.name] = cache[cell.name]
        if cell.solve != "off":
            goal = settled[control.name]["bytes"]
            nearest = f"the nearest {cell.solve}={found['width']} gives {found['bytes']:,} bytes"
            fits = abs(found["bytes"] - goal) <= TOLERANCE * goal
            require(
                fits,
                f"{cell.where}: cell {cell.name}: {nearest}, the control {control.name} has {goal:,}",
            )
    return settled


# ---- Runs


def events_of(log: Path) -> dict[str, dict]:
    """The JSON lines of a log, by event, the last of each; none without a log."""
    return runlog.Run.read(log).json_events if log.exists() else {}


def row_of(log: Path, score: str) -> dict[str, object]:
    """A run's figures: COLUMNS, and tokens per second. Raises Refusal when one is missing or the score is PARTIAL."""
    events = events_of(log)
    needed = ("train_summary", "eval_summary") if score == "sliding" else ("train_summary",)
    for name in needed:
        require(name in events, f"{log.name} has no {name}")
        require(not events[name].get("partial"), f"{name} is PARTIAL")
    row = events["train_summary"] | {"val_bpb": events[needed[-1]].get("val_bpb")}
    for name in COLUMNS:
        good = type(row.get(name)) in (int, float) and math.isfinite(row[name])
        require(good, f"{log.name}: {name} is {row.get(name)}")
    return {name: row[name] for name in COLUMNS} | {
        "tok_per_s": row["tokens"] / max(row["train_seconds"], 1e-9)
    }


def files_of(folder: Path, cell: Cell) -> dict[int, Path]:
    """The files <cell>_seed<seed>.txt of a folder, by seed in order."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = (re.fullmatch(rf"{re.escape(cell.name)}_seed(\d+)\.txt", name) for name in names)
    return dict(sorted((int(match[1]), folder / match[0]) for match in found if match))


def closing_line(cell: Cell, seed: int, score: str) -> dict[str, object]:
    """What ends the log of a run: everything that decides its figures."""
    return {
        "event": "ablation",
        "cell": cell.name,
        "seed": seed,
        "score": score,
        "knobs": cell.knobs,
    } | (cell.source.hashes)


def check_logs(out: Path, cells: list[Cell], score: str) -> None:
    """Raises Refusal when a log of these cells was made otherwise than the grid would have it now."""
    for cell in cells:
        for seed, path in files_of(out, cell).items():
            made, wanted = events_of(path).get("ablation"), closing_line(cell, seed, score)
            require(made, f"{path}: has no closing line of ablate.py")
            for key in sorted(made["knobs"].keys() | cell.knobs.keys()):
                old, new = (
                    f"{key}={d[key]}" if key in d else f"no {key}"
                    for d in (made["knobs"], cell.knobs)
                )
                require(
                    old == new,
                    f"{path} was made with {old}, the grid says {new}: use another --out",
                )
            require(
                made["score"] == score,
                f"{path} was made with --score {made['score']}: use another --out",
            )
            script = (
                f"{path} was made with another version of {cell.source.path} or its eval_sliding.py"
            )
            require(
                all(made.get(key) == wanted[key] for key in wanted), f"{script}: use another --out"
            )


def leash(cores: set[int], parent: int, libc: ctypes.CDLL) -> None:
    """In a child before it starts: die with the runner, and keep to some cores."""
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.sched_setaffinity(0, cores)
    if os.getppid() != parent:
        os._exit(1)


class Run:
    """One cell with one seed in a work folder: the training, then the evaluation unless the artifact's score counts."""

    def __init__(self, out: Path, cell: Cell, seed: int, score: str, cores: set[int]):
        self.out, self.cell, self.seed, self.score, self.cores = out, cell, seed, score, cores
        self.name, self.started = f"{cell.name}_seed{seed}", time.perf_counter()
        self.work = out / ".work" / self.name
        if self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True)
        (self.work / "train_gpt.py").write_bytes(cell.source.train)
        (self.work / "eval_sliding.py").write_bytes(cell.source.evaluation)
        self.stages = [["train_gpt.py"], ["eval_sliding.py", f"logs/{self.name}.ptz"]][
            : 2 if score == "sliding" else 1
        ]
        self.start()

    def start(self) -> None:
        """Start the next stage, the leader of a process group."""
        env = {name: value for name, value in os.environ.items() if re.fullmatch(INHERITED, name)}
        env |= {
            "OMP_NUM_THREADS": str(len(self.cores)),
            "SEED": str(self.seed),
            "RUN_ID": self.name,
        } | self.cell.knobs
        parent, libc = os.getpid(), ctypes.CDLL(None)
        with (
            open(self.work / "stdout.txt", "ab") as out,
            open(self.work / "stderr.txt", "ab") as err,
        ):
            self.process = subprocess.Popen(
                [sys.executable, *self.stages.pop(0)], cwd=self.work, env=env, stdin=subprocess.DEVNULL, stdout=out,
                stderr=err, start_new_session=True, preexec_fn=lambda: leash(self.cores, parent, libc)
            )  # fmt: skip

    def over(self) -> bool:
        """Whether all stages have ended or one has failed; starts the next when one has ended well."""
        if self.process.poll() == 0 and self.stages:
            self.start()
        return self.process.poll() is not None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> str:
        """File the artifact, then the log; or what a failed run has printed. Returns the score or error in words."""
        log, failed = (
            self.work / "logs" / f"{self.name}.txt",
            self.out / "failed" / f"{self.name}.txt",
        )
        printed = [(self.work / f"{name}.txt").read_bytes() for name in ("stdout", "stderr")]
        try:
            errors = printed[1].decode(errors="replace").strip().splitlines()
            require(
                self.process.returncode == 0,
                (errors or [f"exit status {self.process.returncode}"])[-1],
            )
            row, artifact = row_of(log, self.score), log.with_suffix(".ptz")
            require(artifact.is_file(), f"{artifact.name} is missing")
        except (Refusal, ValueError) as error:
            write_atomically(failed, b"".join(printed) + f"\nablate.py: {error}\n".encode())
            text = f"FAILED: {error}"
        else:
            (self.out / "artifacts").mkdir(exist_ok=True)
            os.replace(artifact, self.out / "artifacts" / artifact.name)
            last = json.dumps(
                closing_line(self.cell, self.seed, self.score) | {"threads": len(self.cores)}
            )
            body = log.read_bytes().replace(
                self.cell.source.train, b""
            )  # which sources/ has once for all runs
            write_atomically(self.out / log.name, body + last.encode() + b"\n")
            failed.unlink(missing_ok=True)
            text = f"{row['val_bpb']:.4f}"
        shutil.rmtree(self.work)
        return f"{text} ({time.perf_counter() - self.started:.0f} s)"


def shares(jobs: int) -> list[set[int]]:
    """Disjoint equal sets of the cores that this process may use. Raises Refusal when there are too few."""
    cores = (
        sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count()))
    )
    each = len(cores) // jobs
    require(each > 0, f"--jobs {jobs}: this process has {len(cores)} cores")
    return [set(cores[job * each : (job + 1) * each]) for job in range(jobs)]


def run_all(
    out: Path, cells: list[Cell], todo: list[tuple[Cell, int]], total: int, args: argparse.Namespace
) -> None:
    """Run what is to do, --jobs at a time, and bring the table up to date after each."""
    free, running, started, remaining = shares(args.jobs), [], time.perf_counter(), list(todo)
    try:
        while remaining or running:
            while remaining and free:
                running.append(Run(out, *remaining.pop(0), args.score, free.pop()))
            time.sleep(0.02)
            for run in [run for run in running if run.over()]:
                running.remove(run)
                free.append(run.cores)
                text, left = run.finish(), len(remaining) + len(running)
                write_outputs(out, cells)
                eta = (time.perf_counter() - started) / (len(todo) - left) * left
                eta = f"{eta:.0f} s" if eta < 100 else f"{eta / 60:.0f} min"
                print(
                    f"{total - left}/{total} {run.cell.name} seed {run.seed}: {text}, ETA {eta}",
                    flush=True,
                )
    finally:
        for run in running:
            run.kill()


# ---- Table


@dataclass(frozen=True)
class Row:
    """A cell's runs by seed; its mean minus the control's and the half-width of the 95 % CI of that, bpb; the p of
    Welch's test. `note` says why there is no comparison."""

    cell: Cell
    runs: dict[int, dict]
    note: str = ""
    delta: float | None = None
    half: float | None = None
    p: float | None = None

    @property
    def scores(self) -> dict[int, float]:
        return {seed: run["val_bpb"] for seed, run in self.runs.items()}


def needed(module: str) -> ModuleType:
    """An optional package's module. Raises Refusal when it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise Refusal(f"ablate.py needs {package}: pip install {package}") from error


def pooled_deviation(groups: list[list[float]]) -> tuple[float, int]:
    """Standard deviation of values about the means of their groups, and its degrees of freedom. With two or three seeds
    a cell's own would be of no use, and what seeds do to a model of one size differs little from cell to cell."""
    freedom = sum(len(group) - 1 for group in groups if group)
    squares = sum((x - statistics.mean(group)) ** 2 for group in groups for x in group)
    return math.sqrt(squares / freedom) if freedom else math.nan, freedom


def half_width(deviation: float, freedom: int, n: int, control: int) -> float:
    """Of the 95 % confidence interval of the difference of two means, of n and `control` values, bpb."""
    return needed("scipy.stats").t.ppf(0.975, freedom) * deviation * math.sqrt(1 / n + 1 / control)


def compare(out: Path, cells: list[Cell]) -> list[Row]:
    """A row per cell from the logs in `out`."""
    rows = []
    for cell in cells:
        runs = {
            seed: row_of(log, events_of(log)["ablation"]["score"])
            for seed, log in files_of(out, cell).items()
        }
        failed = len(files_of(out / "failed", cell).keys() - runs.keys())
        row = Row(
            cell, runs, f"failed for {failed} of {failed + len(runs)} seeds" if failed else ""
        )
        control = rows[0] if rows else row
        if runs and control.runs and not row.note:
            sizes = [
                statistics.mean(run["bytes_model"] for run in part.runs.values())
                for part in (row, control)
            ]
            off = abs(sizes[0] / sizes[1] - 1)
            row = replace(row, note=f"bytes differ by {100 * off:.1f} %" if off > TOLERANCE else "")
        if rows and runs and control.runs and not row.note:
            both = [list(part.scores.values()) for part in (row, control)]
            row = replace(row, delta=statistics.mean(both[0]) - statistics.mean(both[1]))
            if min(map(len, both)) > 1 and any(map(statistics.stdev, both)):
                row = replace(row, p=needed("scipy.stats").ttest_ind(*both, equal_var=False).pvalue)
        rows.append(row)
    spread, freedom = pooled_deviation([list(row.scores.values()) for row in rows])
    compared = [row.delta is not None and freedom > 0 for row in rows]
    return [
        replace(row, half=half_width(spread, freedom, len(row.runs), len(rows[0].runs)))
        if known
        else row
        for row, known in zip(rows, compared, strict=True)
    ]


def resolution(rows: list[Row]) -> str:
    """What differences the study can see, in words."""
    n, scores = len(rows[0].runs), [row.scores for row in rows]
    spread, freedom = pooled_deviation([list(by_seed.values()) for by_seed in scores])
    if not freedom or not n:
        return "Resolution: unknown; it takes two seeds of a cell, and the control."
    paired = [
        [y - scores[0][seed] for seed, y in by_seed.items() if seed in scores[0]]
        for by_seed in scores[1:]
    ]
    text = f"Resolution: 95 % CI of +-{half_width(spread, freedom, n, n):.4f} bpb for a cell with the control's n = {n}"
    text += f"; standard deviation of seeds, pooled over cells: {spread:.4f} (freedom {freedom})"
    if pooled_deviation(paired)[1]:
        text += f"; of differences of the same seed: {pooled_deviation(paired)[0]:.4f}"
    return text + "."


def table(rows: list[Row]) -> str:
    """The markdown table with the study's resolution below it."""
    titles = "| cell | solved width | params | model bytes | tok/s | n | float mean | mean | std | delta | 95 % CI |"
    lines = [f"{titles} Welch p |", "|" + "---|" * 12]
    for row in rows:
        runs, cells = list(row.runs.values()), [row.cell.name] + ["-"] * 11
        if runs:
            means = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
            solved = row.cell.solve != "off"
            cells[1] = f"{row.cell.solve}={row.cell.knobs[row.cell.solve]}" if solved else "-"
            cells[2:5] = (f"{means[name]:,.0f}" for name in ("params", "bytes_model", "tok_per_s"))
            cells[6:8] = (f"{means[name]:.4f}" for name in ("val_bpb_float", "val_bpb"))
        if len(runs) > 1:
            cells[8] = f"{statistics.stdev(run['val_bpb'] for run in runs):.4f}"
        if row.delta is not None:
            cells[9] = f"{row.delta:+.4f}"
            cells[10] = (
                "-"
                if row.half is None
                else f"{row.delta - row.half:+.4f} to {row.delta + row.half:+.4f}"
            )
            cells[11] = "-" if row.p is None else "<0.0001" if row.p < 1e-4 else f"{row.p:.4f}"
        cells[5], cells[9] = (
            str(len(runs)),
            row.note or (cells[9] if row is not rows[0] else "control"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", resolution(rows)]) + "\n"


def plot(rows: list[Row]) -> bytes:
    """A PNG of the differences to the control by cell: seeds, mean and CI."""
    others = rows[1:]
    figure = needed("matplotlib.figure").Figure(
        figsize=(8, 1.5 + 0.4 * len(others)), dpi=120, layout="constrained"
    )
    axes = figure.subplots()
    axes.axvline(0, color="0.4", linewidth=1)
    for y, row in enumerate(others):
        if row.delta is not None:
            control = statistics.mean(rows[0].scores.values())
            seeds = [score - control for score in row.scores.values()]
            axes.plot(seeds, [y + 0.2] * len(seeds), "o", color="C0", markersize=4)
            axes.errorbar(row.delta, y, xerr=row.half, fmt="D", color="C3", markersize=6, capsize=4)
    labels = [f"{row.cell.name}\n({row.note})" if row.note else row.cell.name for row in others]
    axes.set(yticks=range(len(others)), yticklabels=labels, ylim=(max(len(others), 1) - 0.5, -0.5))
    axes.set(
        xlabel="bpb",
        title=f"val_bpb minus the mean of {rows[0].cell.name}: seeds, mean, 95 % CI; left is better",
    )
    axes.grid(axis="x", alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_outputs(out: Path, cells: list[Cell]) -> bool:
    """results.csv, table.md and plot.png from the logs in `out`. Returns whether every cell can be compared."""
    rows, buffer = compare(out, cells), io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["cell", "seed", *COLUMNS, "tok_per_s", "log"])
    for row in rows:
        for seed, run in row.runs.items():
            writer.writerow([row.cell.name, seed, *run.values(), f"{row.cell.name}_seed{seed}.txt"])
    write_atomically(out / "results.csv", buffer.getvalue().encode())
    write_atomically(out / "table.md", table(rows).encode())
    write_atomically(out / "plot.png", plot(rows))
    return not any(row.note for row in rows)


# ---- Command line


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises Refusal; exits with 0 after --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: require(False, f"{message} (more with --help)")
    parser.add_argument("grid", type=Path, metavar="GRID")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the study, made if missing",
    )
    parser.add_argument("--seeds", type=int, nargs="+", required=True, metavar="SEED")
    parser.add_argument(
        "--only", nargs="+", metavar="CELL", help="run these cells; the table has all of them"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, on equal shares of the cores",
    )
    parser.add_argument(
        "--solve",
        choices=(*WIDTHS, "off"),
        default="SHARED_DIM",
        help="knob that makes bytes equal",
    )
    parser.add_argument(
        "--model-bytes",
        type=int,
        metavar="N",
        help="TARGET_BYTES = N + the bytes of the code, packed",
    )
    parser.add_argument(
        "--score", choices=("sliding", "artifact"), default="sliding", help="val_bpb of the table"
    )
    parser.add_argument(
        "--script", type=Path, default=ROOT / "train_gpt.py", metavar="FILE", help="train_gpt.py"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print cells, widths, bytes and runs to do"
    )
    args = parser.parse_args()
    require(args.jobs > 0 and min(args.seeds) >= 0, "--jobs and --seeds: expected positive numbers")
    return args


@contextlib.contextmanager
def sole_runner(out: Path) -> Iterator[None]:
    """Hold the folder's lock, and leave no half-written file when interrupted. Raises Refusal when it is held."""

    def sweep() -> None:
        for rest in out.rglob(".*.tmp"):
            rest.unlink(missing_ok=True)

    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"{out}: another ablate.py is at work there") from None
        sweep()
        try:
            yield
        except KeyboardInterrupt:
            sweep()
            raise


def final_knobs(cell: Cell, found: dict, args: argparse.Namespace) -> Cell:
    """The cell with its solved width, and TARGET_BYTES for --model-bytes. Raises Refusal."""
    more = {cell.solve: str(found["width"])} if cell.solve != "off" else {}
    if args.model_bytes is not None:
        code = len(pack_source(cell.source.train + b"\0" + cell.source.evaluation))
        more["TARGET_BYTES"] = str(args.model_bytes + LOADER_BYTES + code)
    cell = replace(cell, knobs=cell.knobs | more)
    if cell.source.module:
        for seed in args.seeds:
            cell.hyperparameters(SEED=seed)
    return cell


def warn_of_sharing(cells: list[Cell], jobs: int) -> None:
    capped = []
    for cell in cells if jobs > 1 else ():
        default = (
            vars(cell.hyperparameters()).get("max_wallclock_seconds", 0)
            if cell.source.module
            else 0
        )
        capped += [cell.name] if float(cell.knobs.get("MAX_WALLCLOCK_SECONDS", default)) else []
    if capped:
        print(
            f"warning: {jobs} runs at a time share the machine whose seconds cap {' '.join(capped)}",
            file=sys.stderr,
        )


def print_plan(cells: list[Cell], settled: dict[str, dict]) -> None:
    for cell in cells:
        text = "no estimate"
        if cell.name in settled:
            found, hp = settled[cell.name], vars(cell.hyperparameters())
            text = f"{found['bytes']:,} bytes, {found['params']:,} parameters"
            if {"iterations", "train_batch_tokens"} <= hp.keys():
                tokens = hp["iterations"] * hp["train_batch_tokens"]
                text += f", {tokens / found['params']:.2f} tokens per parameter"
                text += " at most" if hp.get("max_wallclock_seconds") else ""
        width = f" {cell.solve}={cell.knobs[cell.solve]}" if cell.solve != "off" else ""
        print(f"{cell.name}{width}: {text}")


def main() -> None:
    """Plan, check, run and report; exits with 1 if not every cell can be compared. Raises Refusal."""
    args = parse_arguments()
    cells = read_grid(args.grid, args.script, args.solve)
    unknown = sorted({*(args.only or ())} - {cell.name for cell in cells})
    require(not unknown, f"--only {' '.join(unknown)}: no such cell in {args.grid}")
    for module in ("scipy.stats", "matplotlib.figure"):
        needed(module)
    out = args.out.absolute()
    with sole_runner(out):
        settled = (
            settle(cells, out) if args.dry_run or any(cell.solve != "off" for cell in cells) else {}
        )
        cells = [final_knobs(cell, settled.get(cell.name), args) for cell in cells]
        check_logs(out, cells, args.score)
        asked = [
            (c, s)
            for s in dict.fromkeys(args.seeds)
            for c in cells
            if not args.only or c.name in args.only
        ]
        todo = [(cell, seed) for cell, seed in asked if seed not in files_of(out, cell)]
        if args.dry_run:
            print_plan(cells, settled)
            print(f"{len(todo)} of {len(asked)} runs to do")
            return
        for source in {cell.source.path: cell.source for cell in cells}.values():
            write_atomically(
                out / "sources" / f"{source.hashes['script_sha256'][:12]}.py", source.train
            )
        warn_of_sharing(cells, args.jobs)
        run_all(out, cells, todo, len(asked), args)
        comparable = write_outputs(out, cells)
    print((out / "table.md").read_text())
    sys.exit(0 if comparable else 1)


if __name__ == "__main__":
    run_entry_point(main)

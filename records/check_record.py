"""Check a records folder as a reviewer does: paperwork against logs, bytes, times, seeds, statistics, and the script.

    python records/check_record.py records/track_non_record_16mb/2026-11-24_CpuProfile
    python records/check_record.py FOLDER --against 1394          # Welch's test against a row of leaderboard.csv
    python records/check_record.py FOLDER --no-run                # do not run its script

Works on any folder, ours or a stranger's, with logs in our dialect or in either of upstream's. Prints a table and
nothing else; exit status 1 if a check fails, 2 for a folder that is none. Unless --no-run is given, the folder's script
is imported and run for ten steps on the CPU, from a copy of the folder alone: look at a stranger's script first.
"""

import argparse
import ast
import datetime
import functools
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from leaderboard import CHALLENGE_TARGETS, find_baseline, logs_in
from make_record import MAX_SECONDS, TRACKS, differences, environment
from runlog import NUMBER, Run
from tokenize_docs import ShardWriter, train_tokenizer

from train_gpt import BOS_ID, MAX_SUBMISSION_BYTES, Refusal, require, run_entry_point

NUMERIC = (int, float)
SCORE_DIGITS = 4  # after the point: with fewer, a score is taken to end in zeros
REQUIRED = {"author": str, "github_id": str, "name": str, "blurb": str, "date": str}
REQUIRED |= {
    "val_bpb": NUMERIC,
    "val_loss": NUMERIC,
    "bytes_total": int,
}  # what accepted records have
OPTIONAL = {
    "bytes_code": int,
    "bytes_model": int,
    "val_bpb_std": NUMERIC,
    "val_loss_std": NUMERIC,
    "track": str,
}
OPTIONAL |= {
    "seeds": (list, dict),
    "seed_results": dict,
    "hardware": str,
    "step_stop": int,
    "compliance": dict,
}
OPTIONAL |= {
    "pre_quant_val_bpb": NUMERIC,
    "pre_quant_val_loss": NUMERIC,
    "wallclock_seconds": NUMERIC,
}
ABSENT = (
    "flash_attn",
    "flash_attn_interface",
    "zstandard",
    "brotli",
    "huggingface_hub",
    "matplotlib",
    "scipy",
)
SMOKE = {"ITERATIONS": "10", "TRAIN_BATCH_TOKENS": "4096", "TRAIN_SEQ_LEN": "256"}
SMOKE_SECONDS = 1800
NEEDS_GPU = "CUDA is required|not compiled with CUDA|[Nn]o NVIDIA driver|No CUDA GPUs|CUDA (is )?not available"
LEAKY_SHARDS = (
    1499  # of a CaseOps preparation that put validation documents into training (upstream PR #2127)
)
IMPORT = f"""
import json, pathlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}, which is optional")
sys.meta_path.insert(0, Absent())
sys.path.insert(0, ".")
sys.argv = ["train_gpt.py"]
import train_gpt
knobs = train_gpt.Hyperparameters
shape = {{name: getattr(knobs, name) for name in ("model_dim", "num_layers", "vocab_size")}}
files = [pathlib.Path(train_gpt.__file__).with_name(name) for name in ("train_gpt.py", "eval_sliding.py")]
sources = [path.read_text(encoding="utf-8") for path in files if path.exists()]
sys.stderr.write("\\n" + json.dumps({{"sources": sources, **shape}}))
"""


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    check: str
    text: str
    holds: bool | None  # None: could not be checked, or is only for information


@dataclass
class Folder:
    """A records folder as found. `submission` is {} where there is none that can be read."""

    path: Path
    runs: list[Run]
    submission: dict
    readme: str
    script: Path | None
    unreadable: list[str]  # what is wrong with logs that are no text

    @classmethod
    def read(cls, path: Path) -> "Folder":
        """Raises Refusal when `path` is no folder or holds nothing of a record."""
        require(path.is_dir(), f"{path}: no such folder")
        runs, unreadable = {}, []
        for log in reversed(logs_in(path)):
            try:
                run = Run.read(log)
            except Refusal as error:
                unreadable.append(str(error))
            else:
                runs[run.text] = run  # once, where train.log repeats the log of a seed
        runs = sorted(runs.values(), key=lambda run: run.path)
        runs = [run for run in runs if run.dialect != "unknown" or run.score]
        scripts = (
            [path / "train_gpt.py"]
            if (path / "train_gpt.py").exists()
            else sorted(path.glob("train*.py"))
        )
        readme = path / "README.md"
        anything = (
            runs or unreadable or scripts or readme.exists() or (path / "submission.json").exists()
        )
        require(
            anything,
            f"{path}: neither a log, a script, a README.md nor a submission.json: no records folder",
        )
        try:
            submission = json.loads((path / "submission.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            submission = {}
        submission = submission if isinstance(submission, dict) else {}
        text = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else ""
        return cls(path, runs, submission, text, scripts[0] if scripts else None, unreadable)

    @property
    def is_record(self) -> bool:
        """Whether the folder competes, for which the limits of time and the statistics hold."""
        place = self.path.resolve().parent.name
        track = (
            place.removeprefix("track_")
            if place.startswith("track_")
            else self.submission.get("track")
        )
        return track == TRACKS[0]

    @property
    def scored(self) -> list[Run]:
        return [run for run in self.runs if run.score is not None]


def digits(text: str) -> int:
    """After the decimal point."""
    return len(text.partition(".")[2])


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number, which true and false are not."""
    return isinstance(value, NUMERIC) and not isinstance(value, bool) and abs(value) < 1e15


def agrees(stated: object, values: list[float | None]) -> bool:
    """Whether a figure is one of `values`, at the precision with which it is stated."""
    text = stated if isinstance(stated, str) else repr(stated)
    step = 10.0 ** -digits(text)
    return any(v is not None and abs(float(text) - v) <= 0.5 * step + 1e-9 * abs(v) for v in values)


def seed_of(run: Run) -> int | None:
    """As the log says or, in logs that do not, as its file is named."""
    named = re.search(r"(?:seed|train)_?(\d+)", run.path.stem)
    return run.seed if run.seed is not None else int(named[1]) if named else None


# ---- Paperwork


def check_files(folder: Folder) -> Iterator[Finding]:
    expected = {
        "README.md": folder.readme,
        "submission.json": (folder.path / "submission.json").exists(),
    }
    missing = [name for name, there in expected.items() if not there]
    missing += [] if folder.script else ["train_gpt.py"]
    missing += [] if folder.runs else ["a log (train_seed<SEED>.log)"]
    foreign = [
        path.name
        for path in sorted(folder.path.rglob("*"))
        if path.suffix in (".ptz", ".pt", ".bin", ".npy")
    ]
    faults = [f"missing: {', '.join(missing)}"] if missing else []
    faults += [f"models and data do not belong here: {', '.join(foreign)}"] if foreign else []
    faults += folder.unreadable
    text = f"README, submission.json, script, {len(folder.runs)} logs"
    yield Finding("files", "; ".join(faults) or text, not faults)
    named = re.fullmatch(r"\d{4}-\d\d-\d\d_[A-Za-z0-9_.+-]+", folder.path.resolve().name)
    yield Finding("name", f"{folder.path.resolve().name}: YYYY-MM-DD_Name", bool(named))


def type_faults(submission: dict) -> Iterator[str]:
    """What is missing from a submission.json or of another type than in accepted records."""
    for key, kind in (REQUIRED | OPTIONAL).items():
        value = submission.get(key)
        if key not in submission:
            if key in REQUIRED:
                yield f"no {key}"
        elif value is None and key.endswith("_std"):
            continue
        elif not isinstance(value, kind) or isinstance(value, bool):
            yield f"{key} is {json.dumps(value)[:30]}"
        elif isinstance(value, NUMERIC) and not (
            is_number(value) and (value > 0 or key.endswith("_std"))
        ):
            yield f"{key} is {str(value)[:30]}"
        elif value == "":
            yield f"{key} is empty"
    try:
        datetime.date.fromisoformat(str(submission.get("date"))[:10])
    except ValueError:
        yield f"date is {submission.get('date')!r}"


def check_submission(folder: Folder) -> Iterator[Finding]:
    if not folder.submission:
        yield Finding("submission.json", "missing, or no JSON object", False)
        return
    faults, place = list(type_faults(folder.submission)), folder.path.resolve().parent.name
    track = str(folder.submission.get("track", "")).replace("-", "_")
    if (
        place.startswith("track_")
        and track
        and not track.startswith(place.removeprefix("track_")[:5])
    ):
        faults.append(f"track is {track}, the folder lies in {place}")
    text = "; ".join(faults) or f"{len(folder.submission)} keys of the right types"
    yield Finding("submission.json", text, not faults)


def check_seeds(folder: Folder) -> Iterator[Finding]:
    """Which runs there are, that each is finished, and that submission.json has the same."""
    unscored = [run.path.name for run in folder.runs if run.score is None]
    partial = [run.path.name for run in folder.scored if run.score.partial]
    seeds, faults = [seed_of(run) for run in folder.scored], []
    faults += [f"no final score in {', '.join(unscored)}"] if unscored else []
    faults += [f"PARTIAL score in {', '.join(partial)}"] if partial else []
    repeated = sorted({seed for seed in seeds if seed is not None and seeds.count(seed) > 1})
    faults += [f"several logs of seed {', '.join(map(str, repeated))}"] if repeated else []
    for key in ("seeds", "seed_results"):
        stated = folder.submission.get(key)
        if isinstance(stated, (list, dict)) and {str(seed) for seed in stated} != {
            str(seed) for seed in seeds
        }:
            found = ", ".join(map(str, stated)), ", ".join(map(str, seeds))
            faults.append(f"submission.json has {key} {found[0]}, the logs {found[1]}")
    for run in folder.scored:
        named = re.search(r"seed_?(\d+)", run.path.stem)
        if named and run.seed is not None and int(named[1]) != run.seed:
            faults.append(f"{run.path.name} is the log of seed {run.seed}")
    text = f"{len(seeds)}: {', '.join(map(str, seeds))}" + (
        "" if len(seeds) >= 3 else "; a record needs three"
    )
    yield Finding(
        "seeds", "; ".join(faults) or text, not faults and (len(seeds) >= 3 or not folder.is_record)
    )


def check_scores(folder: Folder) -> Iterator[Finding]:
    """submission.json against the logs: the mean, the spread, and every seed's results."""
    runs, stated, faults = folder.scored, folder.submission, []
    if not runs:
        return
    means = {
        "val_bpb": [run.score.bpb for run in runs],
        "val_loss": [run.score.loss for run in runs],
    }
    for key, values in means.items():
        spread = statistics.stdev(values) if len(values) > 1 else None
        for name, value in ((key, statistics.fmean(values)), (f"{key}_std", spread)):
            found = stated.get(name)
            few = is_number(found) and name == "val_bpb" and digits(repr(found)) < SCORE_DIGITS
            exact = f"{found:.{SCORE_DIGITS}f}" if few else found
            if is_number(found) and value is not None and not agrees(exact, [value]):
                population = name.endswith("_std") and agrees(found, [statistics.pstdev(values)])
                faults += [] if population else [f"{name} is {found}, the logs give {value:.8f}"]
    for name, allowed in summaries(runs).items():
        found, numbers = stated.get(name), [value for value in allowed if is_number(value)]
        wrong = (
            found not in allowed
            if isinstance(found, str)
            else is_number(found) and not agrees(found, numbers)
        )
        faults += [f"{name} is {found}, the logs give {allowed[0]}"] if allowed and wrong else []
    results = stated.get("seed_results")
    for run in runs if isinstance(results, dict) else ():
        own, facts = (
            results.get(str(seed_of(run)), {}),
            {"val_bpb": [run.score.bpb], "val_loss": [run.score.loss]},
        )
        facts |= {"artifact_bytes": [run.bytes_model, run.bytes_total], "steps": [run.steps]}
        facts |= {
            "train_time_s": [run.train_seconds],
            "eval_time_s": [run.eval_seconds, run.score.seconds],
        }
        for key, values in facts.items():
            if isinstance(own, dict) and is_number(own.get(key)) and not agrees(own[key], values):
                faults.append(f"seed {seed_of(run)} {key} is {own[key]}, its log has {values[0]}")
    mean = statistics.fmean(means["val_bpb"])
    yield Finding(
        "scores", "; ".join(faults) or f"val_bpb {mean:.5f}, every seed as in its log", not faults
    )


def summaries(runs: list[Run]) -> dict[str, list]:
    """What else a submission.json may say of all runs: mean, extremes, or any of them; empty where no log has it."""
    before = [run.final("float") for run in runs if run.final("float")]
    columns = {
        "pre_quant_val_bpb": [row.bpb for row in before],
        "pre_quant_val_loss": [row.loss for row in before],
    }
    columns |= {
        "step_stop": [run.steps for run in runs],
        "wallclock_seconds": [run.train_seconds for run in runs],
    }
    columns |= {
        "eval_time_seconds": [run.eval_seconds for run in runs],
        "bytes_model": [r.bytes_model for r in runs],
    }
    found = {}
    for name, values in columns.items():
        known = [value for value in values if value is not None]
        found[name] = [statistics.fmean(known), max(known), *known] if known else []
    # Of a number that has to be a whole one, the mean is rounded; of bytes only the largest counts.
    found["step_stop"] += [round(found["step_stop"][0])] if found["step_stop"] else []
    found["bytes_model"] = found["bytes_model"][1:2]
    torch = sorted({run.versions["torch"] for run in runs if "torch" in run.versions})
    return found | {"pytorch_version": torch + [version.split("+")[0] for version in torch]}


def figures_of(run: Run) -> dict[str, float]:
    """What a README may say of a run, by a name that is the same for all of its seeds."""
    figures = {
        f"{row.label} {what}": value for row in run.finals for what, value in row._asdict().items()
    }
    figures |= {
        f"last {what}": value for row in run.val[-1:] for what, value in row._asdict().items()
    }
    figures |= (
        {f"score {what}": value for what, value in run.score._asdict().items()} if run.score else {}
    )
    names = "bytes_code bytes_model bytes_total steps train_seconds eval_seconds params"
    figures |= {name: getattr(run, name) for name in names.split(" ")}
    averages = re.findall(r"step_avg:([\d.]+)ms", run.text)
    figures |= {"step_avg": float(averages[-1])} if averages else {}
    if run.train_seconds is not None and run.steps:
        figures["ms per step"] = 1000 * run.train_seconds / run.steps
    return {name: float(value) for name, value in figures.items() if isinstance(value, NUMERIC)}


def rows_of_figures(text: str, seeds: set[str]) -> list[tuple[str, list[str]]]:
    """Of the first table in Markdown with a row for one of the seeds: the first cell of every row, and the figures in
    its other cells, those with four decimals or five digits, which are scores or bytes."""
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        rows = [
            [cell.strip(" *`") for cell in line.strip().strip("|").split("|")]
            for line in table.splitlines()
        ]
        if seeds & {row[0] for row in rows}:
            plain = [[re.match(r"\d[\d,]*(?:\.\d+)?", cell) for cell in row] for row in rows]
            figures = [[match[0].replace(",", "") for match in row[1:] if match] for row in plain]
            shown = [[x for x in row if re.fullmatch(r"\d+\.\d{4,}|\d{5,}", x)] for row in figures]
            return [(row[0], numbers) for row, numbers in zip(rows, shown, strict=True)]
    return []


def check_readme(folder: Folder) -> Iterator[Finding]:
    """The rows of seeds and of means in its table of results, and the number in bold, against the logs."""
    figures = {str(seed_of(run)): figures_of(run) for run in folder.scored}
    common = set.intersection(*map(set, figures.values())) if figures else set()
    over_seeds = [[own[name] for own in figures.values()] for name in common]
    allowed = {seed: list(own.values()) for seed, own in figures.items()}
    means = [summary(values) for values in over_seeds for summary in (statistics.fmean, max)]
    faults, checked, rows = [], 0, rows_of_figures(folder.readme, set(figures))
    absent = set(figures) - {first for first, _ in rows} if rows else set()
    faults += [f"no row for seed {seed}" for seed in sorted(absent)]
    for first, stated in rows:
        mean = re.match("mean|average", first, re.I)
        if first in figures or mean:
            checked += len(stated)
            wrong = [x for x in stated if not agrees(x, means if mean else allowed[first])]
            faults += [
                f"{first if mean else f'seed {first}'}: {x} is not what the logs give"
                for x in wrong
            ]
    scores = [statistics.fmean(run.score.bpb for run in folder.scored)] if folder.scored else []
    bold = re.findall(rf"\*\*val_bpb:? *[:=]? *{NUMBER}", folder.readme)
    faults += [
        f"**val_bpb: {stated}** is not the mean of the logs"
        for stated in bold
        if not agrees(stated, scores)
    ]
    spread = (
        [statistics.stdev(run.score.bpb for run in folder.scored)] if len(folder.scored) > 1 else []
    )
    stds = re.findall(r"^\*\*val_bpb: \S+\*\* \(\d+-seed mean, std ([\d.]+)\)", folder.readme, re.M)
    faults += [
        f"std {stated} is not that of the logs" for stated in stds if not agrees(stated, spread)
    ]
    faults += [] if checked or not folder.scored else ["no table with a row of figures per seed"]
    yield Finding(
        "README",
        "; ".join(faults) or f"{checked + len(bold)} figures, each as in the logs",
        not faults,
    )


# ---- Limits


def check_bytes(folder: Folder) -> Iterator[Finding]:
    """The script's size, the sums, the cap, and that the largest total is the one submitted."""
    totals, faults = [run.bytes_total for run in folder.runs if run.bytes_total is not None], []
    size = folder.script.stat().st_size if folder.script else None
    for run in folder.runs:
        code, model, total = run.bytes_code, run.bytes_model, run.bytes_total
        if total is None:
            faults.append(f"{run.path.name} states no total")
        elif code is not None and model is not None and code + model != total:
            faults.append(f"{run.path.name}: {code:,} + {model:,} is not {total:,}")
        elif code is not None and size is not None and code != size:
            counted = (
                f"{run.path.name} counts {code:,} bytes of code, {folder.script.name} has {size:,}"
            )
            faults.append(counted + (", packed it may have fewer" if code < size else ""))
        faults += (
            [f"{run.path.name}: {total:,} bytes, over the cap"]
            if (total or 0) >= MAX_SUBMISSION_BYTES
            else []
        )
    stated = folder.submission.get("bytes_total")
    if totals and isinstance(stated, int) and stated != max(totals):
        faults.append(f"bytes_total is {stated:,}, the largest in the logs {max(totals):,}")
    coded = folder.submission.get("bytes_code")
    if isinstance(coded, int) and size is not None and coded != size:
        faults.append(f"bytes_code is {coded:,}, {folder.script.name} has {size:,}")
    room = MAX_SUBMISSION_BYTES - max(totals, default=0)
    yield Finding(
        "bytes",
        "; ".join(faults) or f"{max(totals, default=0):,}, {room:,} below the cap",
        not faults,
    )


def check_time(folder: Folder) -> Iterator[Finding]:
    slowest = {}
    for what in ("train", "eval"):
        seconds = [
            s
            for run in folder.runs
            if (s := run.train_seconds if what == "train" else run.eval_seconds)
        ]
        slowest[what] = max(seconds, default=None)
    text = (
        ", ".join(f"{what} {s:.3f} s" if s else f"{what} not stated" for what, s in slowest.items())
        + " at most"
    )
    resumed = [run.path.name for run in folder.runs if run.resumed]
    text += f"; interrupted and resumed: {', '.join(resumed)}" if resumed else ""
    in_time = not resumed and all(s is not None and s < MAX_SECONDS for s in slowest.values())
    holds = in_time if folder.is_record else None
    yield Finding("time", text + f", less than {MAX_SECONDS:.0f} s each allowed", holds)


def check_configuration(folder: Folder) -> Iterator[Finding]:
    if not folder.runs:
        return
    found, counts = differences(folder.runs), {run.targets for run in folder.runs}
    found += ["train_shards 1499: validation documents in training"] if leaky(folder.runs) else []
    text = f"one, {len(folder.runs[0].configuration)} settings, {', '.join(f'{n:,}' for n in counts if n)} targets"
    yield Finding("configuration", "; ".join(found) or text, not found)
    if folder.is_record:
        whole = None if None in counts else min(counts) >= CHALLENGE_TARGETS
        text = {None: "the logs do not state the number of targets", True: "the whole split"}
        yield Finding("validation", text.get(whole, f"{counts} targets, the split has more"), whole)


def leaky(runs: list[Run]) -> bool:
    return any(re.search(rf"train_shards:\s*{LEAKY_SHARDS}\b", run.text) for run in runs)


def check_statistics(folder: Folder, against: list[str]) -> Iterator[Finding]:
    """Welch's test against a row, and the bar of 0.005 nats per token in both units."""
    names, runs = against or (["best"] if folder.is_record else []), folder.scored
    if not names or not runs:
        yield Finding("statistics", "not compared; --against names a row", None)
        return
    baseline = find_baseline(names)
    if not baseline.same_text(runs[0]):
        said = (
            "validated on another text"
            if runs[0].targets
            else "which text the logs were validated on is unknown"
        )
        yield Finding("statistics", f"{baseline.name}: {said}", False if runs[0].targets else None)
        return
    result = baseline.compare(
        [r.score.bpb for r in runs], statistics.fmean(r.nats_per_bpb for r in runs)
    )
    holds = result.reached if folder.is_record else None
    yield Finding("statistics", f"against {baseline.name}: {result.verdict}", holds)


# ---- Script


def run_script(
    arguments: list[str], cwd: Path, env: dict[str, str], seconds: int
) -> tuple[int, str, str]:
    """Python on `arguments` without a GPU and without this repository on its path. Exit status, stdout, stderr."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "OMP_NUM_THREADS", "CC", "CXX")
    base = {name: os.environ[name] for name in kept if name in os.environ} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    try:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=cwd, env=base | env, capture_output=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"not done after {seconds} s"
    return done.returncode, *(
        output.decode(errors="replace") for output in (done.stdout, done.stderr)
    )


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1][:200]


def syntax_fault(path: Path) -> str | None:
    """What Python 3.10 would not read, as far as can be told here."""
    try:
        source = path.read_bytes().decode("utf-8")
        ast.parse(source, feature_version=(3, 10))
    except (UnicodeDecodeError, SyntaxError, ValueError) as error:
        return f"{path.name}: {error}"
    # From 3.12 on, ast accepts f-strings that 3.10 does not; ruff knows them.
    if sys.version_info >= (3, 12) and importlib.util.find_spec("ruff"):
        flags = [
            "--isolated",
            "--no-cache",
            "--target-version=py310",
            "--select=E999",
            "--output-format=concise",
        ]
        code, out, _ = run_script(["-m", "ruff", "check", *flags, str(path)], path.parent, {}, 60)
        if code and "syntax" in out:
            return out.splitlines()[0]
    return None


def check_script(folder: Folder) -> Iterator[Finding]:
    if folder.script is None:
        return
    fault = syntax_fault(folder.script)
    yield Finding("syntax", fault or "UTF-8, Python 3.10", fault is None)
    stated = [run.source for run in folder.runs if run.source]
    packed = [run.code_hashes for run in folder.runs if run.code_hashes]
    if stated and not packed:
        own = folder.script.read_text(encoding="utf-8", errors="replace")
        same = all(source.strip() == own.strip() for source in stated)
        yield Finding(
            "source", "the logs print the script" if same else "the logs print another script", same
        )


def check_import(folder: Folder) -> Iterator[Finding]:
    """That the script can be imported without CUDA and without optional packages, and is the one that the logs ran."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "record")
        shutil.copytree(folder.path, copy)
        if folder.script.name != "train_gpt.py":
            shutil.copy(folder.script, copy / "train_gpt.py")
        code, out, err = run_script(["-c", IMPORT], copy, {}, 300)
        try:
            found = json.loads(err.splitlines()[-1]) if code == 0 else {}
        except ValueError:
            found = {}
        if not isinstance(found, dict) or "sources" not in found:
            yield Finding("import", last_line(err), False)
            return
        said = f", but prints {last_line(out)!r}" if out.strip() else ""
        shape = ", ".join(
            f"{key} {found[key]}" for key in ("model_dim", "num_layers", "vocab_size")
        )
        yield Finding(
            "import", f"without CUDA and {', '.join(ABSENT[2:4])}: {shape}{said}", not said
        )
        hashes = set().union(*(run.code_hashes for run in folder.runs))
        if hashes:
            digest = hashlib.sha256("\0".join(found["sources"]).encode()).hexdigest()
            same, unpacked = (
                hashes == {digest},
                [Path(place, f"unpacked_{i}.py") for i in range(len(found["sources"]))],
            )
            yield Finding(
                "source",
                f"{digest[:12]}, as the logs say" if same else "not what the logs ran",
                same,
            )
            for path, source in zip(unpacked, found["sources"], strict=True):
                path.write_text(source, encoding="utf-8")
            faults = [fault for fault in map(syntax_fault, unpacked) if fault]
            yield Finding("syntax", "; ".join(faults) or "Python 3.10, unpacked", not faults)


@functools.cache
def smoke_tokenizer(vocab_size: int) -> bytes:
    return train_tokenizer(smoke_text(0, 60 + vocab_size // 10), vocab_size)


def smoke_text(seed: int, documents: int) -> list[str]:
    """Documents of made-up words, of which there are enough for any vocabulary."""
    rng, letters = random.Random(seed), "abcdefghijklmnopqrstuvwxyz"
    return [
        " ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(200))
        for _ in range(documents)
    ]


def smoke_data(folder: Path, vocab_size: int) -> dict[str, str]:
    """Shards of made-up text and their tokenizer in `folder`, and the variables that name them."""
    model = smoke_tokenizer(vocab_size)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    folder.mkdir()
    (folder / "smoke.model").write_bytes(model)
    for seed, (split, documents) in enumerate({"train": 120, "val": 4}.items(), 1):
        writer = ShardWriter(folder, split, 1 << 20)
        for text in smoke_text(seed, documents):
            writer.add(np.array([BOS_ID, *processor.encode(text)], dtype=np.uint16))
        writer.flush()
    return {
        "DATA_PATH": str(folder),
        "TOKENIZER_PATH": str(folder / "smoke.model"),
        "VOCAB_SIZE": str(vocab_size),
    }


def check_smoke(folder: Folder) -> Iterator[Finding]:
    """Ten steps of the script in a copy of the folder alone and, of our own, the evaluation of what they made."""
    ours = next((run for run in folder.runs if run.dialect == "ours"), None)
    stated = [
        run.knobs["vocab_size"] for run in folder.runs if run.knobs.get("vocab_size", "").isdigit()
    ]
    vocab = stated[0] if stated else "1024"
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "record")
        shutil.copytree(folder.path, copy)
        env = (
            (environment(ours) if ours else {})
            | smoke_data(Path(place, "data"), int(vocab))
            | SMOKE
        )
        env |= {"RUN_ID": "smoke"} | ({"DEVICE": "cpu", "DTYPE": "float32"} if ours else {})
        code, out, err = run_script([folder.script.name], copy, env, SMOKE_SECONDS)
        said = " ".join(f"{name}={value}" for name, value in SMOKE.items())
        if code and re.search(NEEDS_GPU, last_line(err)):
            yield Finding("smoke", f"needs a GPU: {last_line(err)}", None)
            return
        steps = re.findall(r"^(?:step:)?10/10\b", out, re.M)
        yield Finding(
            "smoke", said if code == 0 and steps else last_line(err), code == 0 and bool(steps)
        )
        if ours and code == 0:
            packed = [] if (copy / "eval_sliding.py").exists() else [folder.script.name]
            code, out, err = run_script(
                [*packed, "eval_sliding.py", "logs/smoke.ptz"], copy, env, SMOKE_SECONDS
            )
            score = re.findall(r"^final_\S+ val_loss:.*", out, re.M)
            yield Finding(
                "evaluation",
                f"eval_sliding.py: {score[0]}" if score else last_line(err),
                bool(score),
            )


# ---- Command line


def check(folder: Folder, against: list[str], run: bool) -> list[Finding]:
    """All findings in the order of the table. Raises Refusal for a row that does not exist."""
    checks: list[Callable[[Folder], Iterator[Finding]]] = [
        check_files,
        check_submission,
        check_seeds,
        check_scores,
    ]
    checks += [check_readme, check_bytes, check_time, check_configuration]
    checks += [functools.partial(check_statistics, against=against), check_script]
    findings = [finding for each in checks for finding in guarded(each, folder)]
    runnable = run and folder.script is not None and syntax_fault(folder.script) is None
    for each in (check_import, check_smoke) if runnable else ():
        if not any(finding.check == "import" and not finding.holds for finding in findings):
            findings += guarded(each, folder)
    return findings


def guarded(each: Callable[[Folder], Iterator[Finding]], folder: Folder) -> list[Finding]:
    """The findings of one check. What a stranger's files hold may defy any expectation: then it is one that failed."""
    name = each.func.__name__ if isinstance(each, functools.partial) else each.__name__
    try:
        return list(each(folder))
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        return [
            Finding(
                name.removeprefix("check_"),
                f"cannot be read: {type(error).__name__}: {error}",
                False,
            )
        ]


def main() -> None:
    """Print the table of the folder on the command line. Exits with 1 if a check fails; raises Refusal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: require(False, f"{message} (--help shows examples)")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="ROW",
        help="a PR, best, logs or a records folder",
    )
    parser.add_argument("--no-run", action="store_true", help="neither import nor run the script")
    args = parser.parse_args()
    findings = check(Folder.read(args.folder), args.against, not args.no_run)
    print("| check | finding | |\n|---|---|---|")
    for finding in findings:
        result, text = (
            {True: "pass", False: "FAIL", None: "-"}[finding.holds],
            " ".join(finding.text.split()),
        )
        print(f"| {finding.check} | {text.replace('|', '/')} | {result} |")
    if any(finding.holds is False for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    run_entry_point(main)

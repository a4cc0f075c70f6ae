"""Check a records folder as a reviewer does: paperwork, bytes, times, seeds, statistics, script.

    python records/check_record.py records/track_non_record_16mb/2026-11-24_CpuProfile
    python records/check_record.py FOLDER --against 1394   # Welch's test against a public row
    python records/check_record.py FOLDER --no-run         # do not run its script

Works on any folder, ours or a stranger's, with logs in our dialect or in either of upstream's.
Prints a table and nothing else. A finding is FAIL where it disqualifies: numbers that contradict
the logs, too many bytes or seconds, leaks, seeds or configurations that differ. It is a remark
where it does not: form, the rounding of a fifth decimal, a table that is missing. Exit status 1 if
anything fails, 2 for a folder that is none. Unless --no-run is given, the folder's script is
run for ten steps on the CPU, from a copy of the folder alone: look at a stranger's script first.
"""

import ast
import base64
import hashlib
import json
import lzma
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
from string import ascii_lowercase

from common import NUMBER, ROOT, ArgumentParser, last_match, markdown_table
from leaderboard import CHALLENGE_TARGETS, find_baseline, logs_in
from make_record import (
    MAX_SECONDS,
    TRACKS,
    deviation,
    differences,
    environment,
    headline,
    seed_table,
    submission,
)
from runlog import RunLog

from train_gpt import MAX_SUBMISSION_BYTES, ConfigError, require, run_entry_point

PASS, REMARK, FAIL, UNKNOWN = "pass", "remark", "FAIL", "-"
NUMERIC = (int, float)
FIFTH_DECIMAL = 2e-5  # a figure that is off by less was rounded, not made up
NUMBERS = ("val_bpb", "val_loss", "bytes_total")  # that every accepted submission.json has
TEXTS = ("author", "github_id", "name", "blurb", "date")
SMOKE = {
    "VOCAB_SIZE": "1024",
    "ITERATIONS": "10",
    "TRAIN_BATCH_TOKENS": "4096",
    "TRAIN_SEQ_LEN": "256",
}
SMOKE_SECONDS = 1800
NEEDS_GPU = r"CUDA|NVIDIA driver"
LEAKY_SHARDS = 1499  # of a preparation that trained on validation documents (upstream PR #2127)
Findings = Iterator[tuple[str, str]]  # severity and text


@dataclass
class Folder:
    """A records folder as found. `submission` is {} where there is none that can be read."""

    path: Path
    runs: list[RunLog]
    submission: dict
    readme: str
    script: Path | None
    unreadable: list[str]  # what is wrong with logs that are no text

    @classmethod
    def read(cls, path: Path) -> "Folder":
        """Read a folder. Raises ConfigError when it is none or holds nothing of a record."""
        require(path.is_dir(), f"{path}: no such folder")
        runs, unreadable = {}, []
        for log in reversed(logs_in(path)):
            try:
                run = RunLog.read(log)
            except ConfigError as error:
                unreadable.append(str(error))
                continue
            if run.dialect != "unknown" or run.score:
                runs[run.text] = run  # once, where train.log repeats the log of a seed

        scripts = sorted(path.glob("train*.py"), key=lambda script: script.name != "train_gpt.py")
        readme, paperwork = path / "README.md", path / "submission.json"
        nothing = "neither a log, a script, a README.md nor a submission.json: no records folder"
        found = runs or unreadable or scripts or readme.exists() or paperwork.exists()
        require(found, f"{path}: {nothing}")
        try:
            submission = json.loads(paperwork.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            submission = None
        if not isinstance(submission, dict):
            submission = {}
        text = readme.read_text("utf-8", errors="replace") if readme.exists() else ""
        logs = sorted(runs.values(), key=lambda run: run.path)
        return cls(path, logs, submission, text, scripts[0] if scripts else None, unreadable)

    @property
    def is_record(self) -> bool:
        """Whether the folder competes, for which the limits of time and the statistics hold."""
        place = self.path.resolve().parent.name
        stated = place if place.startswith("track_") else f"track_{self.submission.get('track')}"
        return stated == f"track_{TRACKS[0]}"

    @property
    def scored(self) -> list[RunLog]:
        """The runs that state a final score, by seed."""
        runs = [run for run in self.runs if run.score is not None]
        return sorted(runs, key=lambda run: str(seed_of(run)).zfill(9))

    @property
    def is_ours(self) -> bool:
        """Whether make_record.py made the folder, so that it can be made again and compared."""
        return all(run.dialect == "ours" for run in self.runs)


def is_number(value: object) -> bool:
    """Say whether a value of a JSON file is a finite number, which true and false are not."""
    return isinstance(value, NUMERIC) and not isinstance(value, bool) and abs(value) < 1e15


def agrees(stated: object, values: list[float], digits: int = 0) -> bool:
    """Say whether a figure is one of `values`, at the precision, or `digits`, it is stated with."""
    decimals = max(digits, len(str(stated).partition(".")[2]))
    return any(abs(float(stated) - v) <= 0.5 * 10.0**-decimals + 1e-9 * abs(v) for v in values)


def compare(name: str, stated: object, values: list[float | None], digits: int = 0) -> Findings:
    """Find a figure that is none of those that the logs give; None is one that they do not give."""
    known = [value for value in values if value is not None]
    if not known or agrees(stated, known, digits):
        return
    off = min(abs(float(stated) - value) for value in known)
    yield REMARK if off < FIFTH_DECIMAL else FAIL, f"{name} is {stated}, the logs give {known[0]}"


def seed_of(run: RunLog) -> int | None:
    """Return the seed as the log says or, in logs that do not, as its file is named."""
    if run.seed is not None:
        return run.seed
    return last_match(r"(?:seed|train)_?(\d+)", run.path.stem, int)


# ---- Paperwork


def check_files(folder: Folder) -> Findings:
    """Find what is missing from the folder or does not belong there."""
    expected = {
        "README.md": folder.readme,
        "submission.json": (folder.path / "submission.json").exists(),
        "train_gpt.py": folder.script,
        "a log (train_seed<SEED>.log)": folder.runs,
    }
    missing = ", ".join(name for name, there in expected.items() if not there)
    if missing:
        yield FAIL, f"missing: {missing}"
    for text in folder.unreadable:
        yield FAIL, text
    for path in sorted(folder.path.rglob("*")):
        if path.suffix in (".ptz", ".pt", ".bin", ".npy"):
            yield REMARK, f"models and data do not belong here: {path.name}"
    name = folder.path.resolve().name
    if not re.fullmatch(r"\d{4}-\d\d-\d\d_[A-Za-z0-9_.+-]+", name):
        yield REMARK, f"{name}: not named YYYY-MM-DD_Name"
    yield PASS, f"README, submission.json, script, {len(folder.runs)} logs"


def check_submission(folder: Folder) -> Findings:
    """Find keys of submission.json that are missing or of another type than in accepted records."""
    stated = folder.submission
    if not stated:
        yield FAIL, "missing, or no JSON object"
        return
    for key in [*NUMBERS, *TEXTS]:
        value = stated.get(key)
        if key not in stated:
            yield REMARK, f"no {key}"
        elif key in NUMBERS and not (is_number(value) and value > 0):
            yield FAIL, f"{key} is {json.dumps(value)[:30]}"
        elif key in TEXTS and not (isinstance(value, str) and value):
            yield REMARK, f"{key} is {json.dumps(value)[:30]}"
    if not re.match(r"\d{4}-\d\d-\d\d", str(stated.get("date"))):
        yield REMARK, f"date is {stated.get('date')!r}, not YYYY-MM-DD"
    track = str(stated.get("track", "")).replace("-", "_")
    place = folder.path.resolve().parent.name
    if track and place.startswith("track_") and not track.startswith(place[6:11]):
        yield FAIL, f"track is {track}, the folder lies in {place}"
    yield PASS, f"{len(stated)} keys of the right types"


def check_seeds(folder: Folder) -> Findings:
    """Find runs that are not finished, and seeds that are repeated or not those submitted."""
    for run in folder.runs:
        if run.score is None:
            yield FAIL, f"no final score in {run.path.name}"
        elif run.score.partial:
            yield FAIL, f"PARTIAL score in {run.path.name}"
        named = re.search(r"seed_?(\d+)", run.path.stem)
        if named and run.seed is not None and int(named[1]) != run.seed:
            yield FAIL, f"{run.path.name} is the log of seed {run.seed}"

    seeds = [str(seed_of(run)) for run in folder.scored]
    for seed in sorted(set(seeds)):
        if seed != "None" and seeds.count(seed) > 1:
            yield FAIL, f"several logs of seed {seed}"
    for key in ("seeds", "seed_results"):
        stated = folder.submission.get(key)
        if isinstance(stated, (list, dict)) and {str(seed) for seed in stated} != set(seeds):
            submitted = ", ".join(map(str, stated))
            yield FAIL, f"submission.json has {key} {submitted}, the logs {', '.join(seeds)}"
    text = f"{len(seeds)}: {', '.join(seeds)}"
    if folder.is_record and len(seeds) < 3:
        yield FAIL, f"{text}; a record needs three"
    yield PASS, text


def check_scores(folder: Folder) -> Findings:
    """Compare submission.json with the logs: every figure of ours, the scores of a stranger's."""
    runs, stated = folder.scored, folder.submission
    if not runs:
        return
    bpb, loss = [run.score.bpb for run in runs], [run.score.loss for run in runs]
    if folder.is_ours:
        expected = submission(runs)
        for key in ("bytes_total", "bytes_code"):  # check_bytes knows more of them
            del expected[key]
    else:
        scores = [{"val_bpb": run.score.bpb, "val_loss": run.score.loss} for run in runs]
        results = dict(zip([str(seed_of(run)) for run in runs], scores, strict=True))
        expected = {"val_bpb": statistics.fmean(bpb), "val_loss": statistics.fmean(loss)}
        expected |= {"val_bpb_std": deviation(bpb), "val_loss_std": deviation(loss)}
        expected["seed_results"] = results

    figures = [(name, stated.get(name), value) for name, value in expected.items()]
    results = stated.get("seed_results")
    for seed, row in expected["seed_results"].items():
        own = results.get(seed) if isinstance(results, dict) else None
        if isinstance(own, dict):
            figures += [(f"seed {seed} {name}", own.get(name), row[name]) for name in row]
    for name, figure, value in figures:
        if is_number(figure) and is_number(value):
            # A score of few digits is taken to end in zeros. Some state the population's spread.
            digits = 4 if name == "val_bpb" else 0
            spread = {"val_bpb_std": bpb, "val_loss_std": loss}.get(name)
            values = [value] if spread is None else [value, statistics.pstdev(spread)]
            yield from compare(name, figure, values, digits)
        elif isinstance(figure, str) and isinstance(value, str) and figure != value:
            yield FAIL, f"{name} is {figure}, the logs give {value}"
    yield PASS, f"val_bpb {statistics.fmean(bpb):.5f}, every figure as in the logs"


def check_readme(folder: Folder) -> Findings:
    """Compare the README with the logs: ours line by line, a stranger's by its scores."""
    runs = folder.scored
    if not runs:
        return
    if folder.is_ours:
        generated = [headline(runs), *seed_table(runs).splitlines()]
        for line in generated:
            if line not in folder.readme:
                yield FAIL, f"its logs give: {line}"
        yield PASS, f"{len(generated)} lines of figures, each as the logs give it"
        return
    mean = statistics.fmean(run.score.bpb for run in runs)
    stated = re.findall(r"\d\.\d{4,}", folder.readme)
    for run in runs:
        if not any(agrees(figure, [run.score.bpb]) for figure in stated):
            yield REMARK, f"does not state the {run.score.bpb:.4f} of seed {seed_of(run)}"
    for figure in re.findall(rf"\*\*val_bpb:? *[:=]? *{NUMBER}", folder.readme):
        yield from compare("**val_bpb**", figure, [mean])
    yield PASS, "states the score of every seed"


# ---- Limits


def check_bytes(folder: Folder) -> Findings:
    """Check the script's size, the sums, the cap, and that the largest total is submitted."""
    size = folder.script.stat().st_size if folder.script else None
    for run in folder.runs:
        code, model, total = run.bytes_code, run.bytes_model, run.bytes_total
        name = run.path.name
        if total is None:
            yield REMARK, f"{name} states no total"
            continue
        if total >= MAX_SUBMISSION_BYTES:
            yield FAIL, f"{name}: {total:,} bytes, over the cap"
        if code is not None and model is not None and code + model != total:
            yield FAIL, f"{name}: {code:,} + {model:,} is not {total:,}"
        if code is not None and size is not None and code != size:
            # A stranger may have counted the code packed, and put it here as it is read.
            severity = REMARK if code < size and run.dialect != "ours" else FAIL
            yield severity, f"{name} counts {code:,} bytes of code, the script has {size:,}"

    totals = [run.bytes_total for run in folder.runs if run.bytes_total is not None]
    stated = folder.submission.get("bytes_total")
    if totals and is_number(stated) and stated != max(totals):
        severity = REMARK if agrees(round(stated), [statistics.fmean(totals), *totals]) else FAIL
        yield severity, f"bytes_total is {stated:,}, the largest in the logs {max(totals):,}"
    coded = folder.submission.get("bytes_code")
    if is_number(coded) and size is not None and coded != size:
        severity = REMARK if coded < size and coded in [r.bytes_code for r in folder.runs] else FAIL
        yield severity, f"bytes_code is {coded:,}, the script has {size:,}"
    largest = max(totals, default=0)
    yield PASS, f"{largest:,}, {MAX_SUBMISSION_BYTES - largest:,} below the cap"


def check_time(folder: Folder) -> Findings:
    """Check the limits of the record track. The step during which the clock runs out may end."""
    shown = []
    for run in folder.runs:
        for what, spent in (("train", run.train_seconds), ("eval", run.eval_seconds)):
            stated = "not stated" if spent is None else f"{spent:.3f} s"
            shown.append(f"{run.path.name}: {what} {stated}")
            if not folder.is_record or (spent is not None and spent < MAX_SECONDS):
                continue
            last_step = run.train_seconds / run.steps if what == "train" and run.steps else 0.0
            over = spent is not None and spent >= MAX_SECONDS + last_step
            yield (
                FAIL if over else REMARK,
                f"{shown[-1]}, less than {MAX_SECONDS:.0f} s are allowed",
            )
        if run.resumed and folder.is_record:
            yield FAIL, f"{run.path.name}: interrupted and resumed"
    yield PASS if folder.is_record else UNKNOWN, "; ".join(shown)


def check_configuration(folder: Folder) -> Findings:
    """Check that all seeds have one configuration, the whole split, and no validation text."""
    for difference in differences(folder.runs):
        yield FAIL, difference
    counts = [run.targets for run in folder.runs]
    for run in folder.runs:
        if re.search(rf"train_shards:\s*{LEAKY_SHARDS}\b", run.text):
            yield FAIL, f"{run.path.name}: train_shards 1499: validation documents in training"
        elif folder.is_record and run.targets is None:
            yield REMARK, f"{run.path.name} does not state its number of validation targets"
        elif folder.is_record and run.targets < CHALLENGE_TARGETS:
            yield FAIL, f"{run.path.name}: {run.targets:,} targets, the split has more"
    if folder.runs:
        settings = len(folder.runs[0].configuration)
        yield PASS, f"one, {settings} settings, {counts[0]} validation targets"


def check_statistics(folder: Folder, against: list[str]) -> Findings:
    """Test by Welch against a row, by the bar of 0.005 nats per token in both units."""
    names, runs = against or (["best"] if folder.is_record else []), folder.scored
    if not names or not runs:
        yield UNKNOWN, "not compared; --against names a row"
        return
    baseline = find_baseline(names)
    same_text = baseline.same_text(runs[0])
    if not same_text:
        said = "unknown" if same_text is None else "not the same"
        severity = UNKNOWN if same_text is None else FAIL
        yield severity, f"against {baseline.name}: the text of the validation is {said}"
        return
    nats = statistics.fmean(run.nats_per_bpb for run in runs)
    _, verdict, reached = baseline.compare([run.score.bpb for run in runs], nats)
    severity = UNKNOWN
    if folder.is_record and reached is not None:
        severity = PASS if reached else FAIL
    yield severity, f"against {baseline.name}: {verdict}"


# ---- Script


def run_script(arguments: list[str], cwd: Path, env: dict[str, str]) -> tuple[int, str, str]:
    """Run Python without a GPU and without this repository. Return status, stdout and error."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "OMP_NUM_THREADS", "CC", "CXX")
    own = {name: os.environ[name] for name in kept if name in os.environ}
    env = own | {"CUDA_VISIBLE_DEVICES": ""} | env
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, timeout=SMOKE_SECONDS)
    except subprocess.TimeoutExpired:
        return 124, "", f"not done after {SMOKE_SECONDS} s"
    out, err = (output.decode(errors="replace") for output in (done.stdout, done.stderr))
    last = (err.strip() or "no output").splitlines()[-1]
    return done.returncode, out, last[:200]


def check_script(folder: Folder) -> Findings:
    """Check that Python 3.10 reads the script, and that it is what the logs print."""
    try:
        source = folder.script.read_text(encoding="utf-8")
        ast.parse(source, feature_version=(3, 10))
        packed = re.search(r'b85decode\("([^"]+)"\)', source)
        unpacked = lzma.decompress(base64.b85decode(packed[1])) if packed else b""
    except (SyntaxError, ValueError, lzma.LZMAError) as error:
        yield FAIL, f"{folder.script.name}: {error}"
        return
    digest = hashlib.sha256(unpacked).hexdigest()
    for run in folder.runs:
        if packed and run.code_hashes and run.code_hashes != {digest}:
            yield FAIL, f"{run.path.name} ran another script than the one that is packed"
        elif not packed and run.source and run.source.strip() != source.strip():
            yield FAIL, f"{run.path.name} prints another script"
    yield PASS, "UTF-8, Python 3.10"


def smoke_data(folder: Path) -> dict[str, str]:
    """Make shards of made-up words and their tokenizer; return the variables that name them."""
    rng, documents = random.Random(0), []
    for _ in range(160):
        words = ["".join(rng.choices(ascii_lowercase, k=rng.randint(2, 9))) for _ in range(200)]
        documents.append(json.dumps({"text": " ".join(words)}) + "\n")
    folder.mkdir()
    (folder / "words.jsonl").write_text("".join(documents))
    tool = [str(ROOT / "data" / "tokenize_docs.py"), "--train", "words.jsonl", "--output", "."]
    tool += ["--num-val-docs", "4", "--train-tokenizer", SMOKE["VOCAB_SIZE"], "--name", "smoke"]
    code, _, err = run_script(tool, folder, {})
    require(code == 0, err)
    return {
        "DATA_PATH": str(folder / "datasets" / "smoke"),
        "TOKENIZER_PATH": str(folder / "tokenizers" / "smoke_bpe.model"),
    }


def check_smoke(folder: Folder) -> Findings:
    """Run ten steps of the script in a copy of the folder alone; of our own, score the result."""
    ours = next((run for run in folder.runs if run.dialect == "ours"), None)
    with tempfile.TemporaryDirectory() as place:
        copy = shutil.copytree(folder.path, Path(place, "record"))
        env = environment(ours) | {"DTYPE": "float32"} if ours else {}
        env |= smoke_data(Path(place, "data")) | SMOKE | {"RUN_ID": "smoke"}
        code, out, err = run_script([folder.script.name], copy, env)
        if code or not re.search(r"^(?:step:)?10/10\b", out, re.M):
            yield UNKNOWN if re.search(NEEDS_GPU, err) else FAIL, err
            return
        yield PASS, " ".join(f"{name}={value}" for name, value in SMOKE.items())
        if ours:
            packed = [] if (copy / "eval_sliding.py").exists() else [folder.script.name]
            scorer = [*packed, "eval_sliding.py", "logs/smoke.ptz"]
            code, out, err = run_script(scorer, copy, env)
            scores = re.findall(r"^final_\S+ val_loss:.*", out, re.M)
            yield PASS if scores else FAIL, scores[0] if scores else err


# ---- Command line


def guarded(check: Callable[[Folder], Findings], folder: Folder) -> list[tuple[str, str]]:
    """Return the findings of one check: what is wrong or, only where nothing is, what is well.

    What a stranger's files hold may defy any expectation: then it is a finding that fails.
    """
    found = []
    try:
        found += check(folder)
    except ConfigError:
        raise
    except Exception as error:
        found.append((FAIL, f"cannot be read: {type(error).__name__}: {error}"))
    problems = [finding for finding in found if finding[0] in (REMARK, FAIL)]
    return problems or found


def check(folder: Folder, against: list[str], run: bool) -> list[tuple[str, str, str]]:
    """Return the rows of the table: check, finding and severity. Raises ConfigError."""
    checks = {
        "files": check_files,
        "submission.json": check_submission,
        "seeds": check_seeds,
        "scores": check_scores,
        "README": check_readme,
        "bytes": check_bytes,
        "time": check_time,
        "configuration": check_configuration,
        "statistics": lambda folder: check_statistics(folder, against),
    }
    if folder.script is not None:
        checks["syntax"] = check_script
    rows = []
    for name, each in checks.items():
        rows += [(name, text, severity) for severity, text in guarded(each, folder)]

    broken = any(name == "syntax" and severity == FAIL for name, _, severity in rows)
    if run and folder.script is not None and not broken:
        rows += [("smoke", text, severity) for severity, text in guarded(check_smoke, folder)]
    return rows


def main() -> None:
    """Print the table of the folder on the command line. Exits with 1 if a check fails."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    rows = "a PR, best, logs or a records folder"
    parser.add_argument("--against", nargs="+", default=[], metavar="ROW", help=rows)
    parser.add_argument("--no-run", action="store_true", help="do not run the script")
    args = parser.parse_args()
    findings = check(Folder.read(args.folder), args.against, not args.no_run)
    shown = [(name, " ".join(text.split()).replace("|", "/"), s) for name, text, s in findings]
    print(markdown_table(["check", "finding", "result"], shown))
    if any(severity == FAIL for _, _, severity in findings):
        sys.exit(1)


if __name__ == "__main__":
    run_entry_point(main)

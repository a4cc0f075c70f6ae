"""Check a records folder as a reviewer does: paperwork, bytes, times, seeds, statistics, script.

    python records/check_record.py records/track_non_record_16mb/2026-11-24_CpuProfile
    python records/check_record.py FOLDER --against 1394   # Welch's test against a public row

Works on any folder, ours or a stranger's, in our dialect of logs or in either of upstream's. Runs
nothing of the folder, and prints a table. A finding is FAIL where it disqualifies and a remark
where reviewers accepted it. Exit status 1 if anything fails, 2 for a folder that is none.
"""

import ast
import base64
import collections
import hashlib
import json
import lzma
import math
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path

from common import NUMBER, ArgumentParser, last_match, markdown_table
from leaderboard import find_baseline, logs_in, on_challenge, split_bytes
from make_record import MAX_SECONDS, TRACKS
from runlog import RunLog

from train_gpt import MAX_SUBMISSION_BYTES, ConfigError, require, run_entry_point

PASS, REMARK, FAIL, UNKNOWN = "pass", "remark", "FAIL", "-"
FIFTH_DECIMAL = 2e-5  # a figure that is off by less was rounded, not made up
NUMBERS = ("val_bpb", "val_loss", "bytes_total")  # that every accepted submission.json has
TEXTS = ("author", "github_id", "name", "blurb", "date")
# Of the bytes that a score implies: more than four digits of it and ways to treat a tail differ.
BYTES_TOLERANCE = 2e-4
# The step during which the clock runs out may end, and one that waits for the GPU already.
LAST_STEPS = 2
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
        # A model that is scored again after its training may have that log in a folder below.
        logs = {log for place in (path, *path.iterdir()) for log in logs_in(place)}
        for log in sorted(logs, reverse=True):
            try:
                run = RunLog.read(log)
                if run.train or run.val or run.score:
                    runs[run.text] = run  # once, where train.log repeats the log of a seed
            except ConfigError as error:
                unreadable.append(str(error))

        scripts = sorted(path.glob("train*.py"), key=lambda script: script.name != "train_gpt.py")
        papers = sorted(path.glob("submission*.json"), key=lambda paper: len(paper.name))
        readme = path / "README.md"
        text = readme.read_text("utf-8", errors="replace") if readme.exists() else ""
        nothing = "neither a log, a script, a README.md nor a submission.json: no records folder"
        require(runs or unreadable or scripts or papers or text, f"{path}: {nothing}")
        try:
            submission = json.loads(papers[0].read_text(encoding="utf-8"))
        except (IndexError, OSError, ValueError, RecursionError):
            submission = {}
        submission = submission if isinstance(submission, dict) else {}
        logs = sorted(runs.values(), key=lambda run: run.path)
        return cls(path, logs, submission, text, scripts[0] if scripts else None, unreadable)

    @property
    def is_record(self) -> bool:
        """Whether the folder competes, for which the limits of time and the statistics hold."""
        place = self.path.resolve().parent.name
        stated = place if place.startswith("track_") else f"track_{self.submission.get('track')}"
        return stated == f"track_{TRACKS[0]}"

    def stated(self, run: RunLog) -> dict:
        """Return the numbers in submission.json of the seed of a run; {} without any."""
        results = self.submission.get("seed_results")
        own = results.get(str(seed_of(run))) if isinstance(results, dict) else None
        own = own.items() if isinstance(own, dict) else ()
        return {name: value for name, value in own if is_number(value)}

    @property
    def scored(self) -> list[RunLog]:
        """The runs that state a final score, by seed."""
        runs = [run for run in self.runs if run.score is not None]
        # Of several of one seed that counts which is submitted; a log may be there twice.
        mine = [run for run in runs if agrees(self.stated(run).get("val_bpb", 0), run.score.bpb)]
        seeds = {seed_of(run): run for run in mine}
        runs = [*seeds.values(), *(run for run in runs if seed_of(run) not in seeds)]
        return sorted(runs, key=lambda run: str(seed_of(run)).zfill(9))


def is_number(value: object) -> bool:
    """Say whether a value of a JSON file is a finite number, which true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def agrees(stated: float | Decimal, value: float) -> bool:
    """Say whether a figure is a value as far as it is written. JSON writes no zeros at the end."""
    least = 0 if isinstance(stated, Decimal) else 4
    decimals = max(least, -Decimal(str(stated)).as_tuple().exponent)
    return abs(float(stated) - value) <= 0.5 * 10.0**-decimals + 1e-9 * abs(value)


def compare(name: str, stated: float | Decimal, values: list[float]) -> Findings:
    """Find a figure that is not the mean of the runs. To state one of them is no contradiction."""
    mean = statistics.fmean(values)
    if not agrees(stated, mean):
        chosen = [value for value in values if agrees(stated, value)]
        severity = REMARK if chosen or abs(float(stated) - mean) < FIFTH_DECIMAL else FAIL
        yield severity, f"{name} is {stated}, the logs give {mean}"


def seed_of(run: RunLog) -> int | None:
    """Return the seed as the log says or, in logs that do not, as its file is named."""
    if run.seed is not None:
        return run.seed
    return last_match(r"(?:seed|train)_?(\d+)", run.path.stem, int)


# ---- Paperwork


def check_files(folder: Folder) -> Findings:
    """Find what is missing from the folder or does not belong there."""
    expected = {"README.md": folder.readme, "train_gpt.py": folder.script, "a log": folder.runs}
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


def check_submission(folder: Folder) -> Findings:
    """Find keys of submission.json that are missing or of another type than in accepted records."""
    stated = folder.submission
    if not stated:
        yield FAIL, "missing, or no JSON object"
        return
    if not (folder.path / "submission.json").exists():
        yield REMARK, "another name than this, which leaderboards look for"
    for key in NUMBERS:
        value = stated.get(key)
        if value is not None and not (is_number(value) and value > 0):
            yield FAIL, f"{key} is {json.dumps(value)[:30]}"
    absent = [key for key in (*NUMBERS, *TEXTS) if not stated.get(key)]
    if absent:
        yield REMARK, f"no {', '.join(absent)}"
    if not re.match(r"\d{4}-\d\d-\d\d", str(stated.get("date"))):
        yield REMARK, f"date is {stated.get('date')!r}, not YYYY-MM-DD"
    track = str(stated.get("track", "")).replace("-", "_")
    place = folder.path.resolve().parent.name
    if track and place.startswith("track_") and not track.startswith(place[6:11]):
        yield FAIL, f"track is {track}, the folder lies in {place}"


def check_seeds(folder: Folder) -> Findings:
    """Find runs that are not finished, and seeds that are repeated or not those submitted."""
    scores = [run.score.bpb for run in folder.scored]
    for run in folder.runs:
        if run.score is None:
            yield FAIL, f"no final score in {run.path.name}"
        elif run.score.partial:
            yield FAIL, f"PARTIAL score in {run.path.name}"
        elif run.score.bpb not in scores:
            yield REMARK, f"{run.path.name}: another score of this seed is submitted"
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
    if folder.is_record and len(set(seeds)) < 3:
        yield REMARK, f"only {', '.join(seeds)}; it usually takes three to show p < 0.01"


def check_scores(folder: Folder) -> Findings:
    """Compare the scores of submission.json with those of the logs."""
    seeds = [(f"seed {seed_of(run)} ", folder.stated(run), [run]) for run in folder.scored]
    for whose, stated, runs in (("", folder.submission, folder.scored), *seeds):
        finals = [run.score for run in runs]
        scores = {"val_bpb": [row.bpb for row in finals], "val_loss": [row.loss for row in finals]}
        for name, values in scores.items():
            if is_number(stated.get(name)):
                yield from compare(whose + name, stated[name], values)


def check_readme(folder: Folder) -> Findings:
    """Compare the scores in the README with those of the logs."""
    scores = [run.score.bpb for run in folder.scored]
    stated = [Decimal(figure) for figure in re.findall(r"\d\.\d{4,}", folder.readme)]
    for run in folder.scored:
        if not any(agrees(figure, run.score.bpb) for figure in stated):
            yield REMARK, f"does not state the {run.score.bpb:.4f} of seed {seed_of(run)}"
    for figure in re.findall(rf"\*\*val[\\_ ]*bpb:? *[:=]? *{NUMBER}", folder.readme):
        yield from compare("**val_bpb**", Decimal(figure), scores)


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
            # A stranger may have counted the code packed, and put it here as it is read; what his
            # log prints is compared with what is here.
            harmless = not run.code_hashes and (code < size or run.source)
            severity = REMARK if harmless else FAIL
            yield severity, f"{name} counts {code:,} bytes of code, the script has {size:,}"

    totals = [run.bytes_total for run in folder.runs if run.bytes_total is not None]
    stated = folder.submission.get("bytes_total")
    if totals and is_number(stated) and stated != max(totals):
        shipped = [run.bytes_model + size for run in folder.runs if run.bytes_model and size]
        other = round(stated) in (*totals, *shipped, round(statistics.fmean(totals)))
        severity = REMARK if other else FAIL
        yield severity, f"bytes_total is {stated:,}, the largest in the logs {max(totals):,}"
    coded = folder.submission.get("bytes_code")
    if is_number(coded) and size is not None and coded != size:
        severity = REMARK if coded < size and coded in [r.bytes_code for r in folder.runs] else FAIL
        yield severity, f"bytes_code is {coded:,}, the script has {size:,}"


def check_time(folder: Folder) -> Findings:
    """Check the limits of the record track."""
    for run in folder.runs if folder.is_record else ():
        end = MAX_SECONDS
        if run.steps and run.train_seconds:
            end += LAST_STEPS * run.train_seconds / run.steps
        limits = (("train", run.train_seconds, end), ("eval", run.eval_seconds, MAX_SECONDS))
        for what, spent, limit in limits:
            if spent is None:
                yield REMARK, f"{run.path.name}: {what} not stated"
            elif spent >= MAX_SECONDS:
                severity = FAIL if spent >= limit else REMARK
                allowed = f"less than {MAX_SECONDS:.0f} s are allowed"
                yield severity, f"{run.path.name}: {what} {spent:.3f} s, {allowed}"
        if run.resumed:
            yield FAIL, f"{run.path.name}: interrupted and resumed"


def check_text(folder: Folder) -> Findings:
    """Check that the scores divide by the bytes that the validated text has.

    Nats per token, bits per byte and targets imply them: too many make a score look better.
    """
    for run in folder.scored:
        name, targets = run.path.name, run.targets
        if targets is None:
            yield REMARK, f"{name} does not state its number of validation targets"
            continue
        if folder.is_record and not on_challenge(run):
            yield FAIL, f"{name}: {targets:,} targets, the split has more"
        implied = targets * run.nats_per_bpb / math.log(2)
        known = {"its log states": run.scored_bytes}
        split = split_bytes(targets)
        if split is not None:
            known[f"{targets:,} targets of {split[0]} are"] = split[1]
        for says, count in known.items():
            if count and abs(implied / count - 1) > BYTES_TOLERANCE:
                ratio = f"{implied / count:.4f} times the {count:,.0f} that {says}"
                yield FAIL, f"{name}: its score implies {implied:,.0f} bytes of text, {ratio}"


def check_configuration(folder: Folder) -> Findings:
    """Check that all seeds have one configuration."""
    stated = collections.defaultdict(list)
    for run in folder.scored:
        facts = run.configuration | {
            "validation targets": run.targets,
            "validation bytes": run.scored_bytes,
            "code": " ".join(sorted(run.code_hashes)),
            "dataset": run.dataset,
            "hardware": run.hardware,
        }
        facts |= {f"evaluation {name}": value for name, value in run.evaluation.items()}
        for name, value in facts.items():
            if value is not None:
                stated[name].append((str(value)[:40], run.path.name))
    for name, values in sorted(stated.items()):
        if len({value for value, _ in values}) > 1:
            yield FAIL, f"{name}: " + ", ".join(f"{value} ({log})" for value, log in values)


def check_statistics(folder: Folder, against: str) -> Findings:
    """Test by Welch against a row, by the bar of 0.005 nats per token in both units."""
    runs = folder.scored
    against = against or ("best" if folder.is_record else "")
    if not against:
        yield UNKNOWN, "not compared; --against names a row"
        return
    baseline = find_baseline(against)
    same_text = baseline.same_text(runs[0])
    if not same_text:
        said = "unknown" if same_text is None else "not the same"
        severity = UNKNOWN if same_text is None else FAIL
        yield severity, f"against {baseline.name}: the text of the validation is {said}"
        return
    nats = statistics.fmean(run.nats_per_bpb for run in runs)
    verdict, reached = baseline.compare([run.score.bpb for run in runs], nats)
    severity = UNKNOWN
    if folder.is_record and reached is not None:
        severity = PASS if reached else FAIL
    yield severity, f"against {baseline.name}: {verdict}"


# ---- Script


def check_script(folder: Folder) -> Findings:
    """Check that Python 3.10 reads the script, and that it is what the logs ran."""
    digest = None
    source = folder.script.read_text(encoding="utf-8")
    ast.parse(source, folder.script.name, feature_version=(3, 10))
    # A stranger's code may be packed in other ways, and its logs state no hash.
    packed = re.search(r'b85decode\("([^"]+)"\)', source)
    if packed and any(run.code_hashes for run in folder.runs):
        digest = hashlib.sha256(lzma.decompress(base64.b85decode(packed[1]))).hexdigest()
    for run in folder.runs:
        if digest and run.code_hashes and run.code_hashes != {digest}:
            yield FAIL, f"{run.path.name} ran another script than the one that is packed"
        elif not digest and run.source and run.source.strip() != source.strip():
            yield FAIL, f"{run.path.name} prints another script"


# ---- Command line


def check(folder: Folder, against: str = "") -> list[tuple[str, str, str]]:
    """Return the rows of the table: check, finding and severity. Raises ConfigError.

    What a stranger's files hold may defy any expectation: then it is a finding that fails.
    """
    checks = {"files": check_files, "submission.json": check_submission, "seeds": check_seeds}
    if folder.scored:
        checks |= {"scores": check_scores, "README": check_readme, "text": check_text}
        checks["statistics"] = partial(check_statistics, against=against)
    checks |= {"bytes": check_bytes, "time": check_time, "configuration": check_configuration}
    if folder.script is not None:
        checks["script"] = check_script
    rows = []
    for name, each in checks.items():
        found = []
        try:
            found += each(folder)
        except ConfigError:
            raise
        except Exception as error:
            found.append((FAIL, f"cannot be read: {type(error).__name__}: {error}"))
        rows += [(name, text, severity) for severity, text in found or [(PASS, "nothing found")]]
    return rows


def main() -> None:
    """Print the table of the folder on the command line. Exits with 1 if a check fails."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--against", default="", metavar="ROW", help="PR, best, log or folder")
    args = parser.parse_args()
    findings = check(Folder.read(args.folder), args.against)
    shown = [(name, " ".join(text.split()).replace("|", "/"), s) for name, text, s in findings]
    print(markdown_table(["check", "finding", "result"], shown))
    if any(severity == FAIL for _, _, severity in findings):
        sys.exit(1)


if __name__ == "__main__":
    run_entry_point(main)

"""Make a records folder out of the logs of several seeds: the paperwork of a submission.

    python records/make_record.py --name TokenRouted --logs logs/*_seed*.txt
    python records/make_record.py --name TokenRouted --logs logs/*_seed*.txt --track 10min_16mb \\
        --previous 1394 --author "A. Name" --github-id aname --blurb "what is new, in a sentence"

The folder records/track_<track>/<date>_<Name>/ gets README.md, submission.json, the logs,
requirements.txt, a plot, and train_gpt.py: train_gpt.py and eval_sliding.py in one ASCII script, of
which the logs state the source and the size. --previous names what to compare with: a row of
leaderboard.csv by its PR, "best", or a log, or a records folder.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import string
import subprocess
import tempfile
import textwrap
from datetime import date
from pathlib import Path

from common import ROOT, ArgumentParser, markdown_table
from leaderboard import Baseline, find_baseline
from plot import draw
from runlog import RunLog

from eval_sliding import EvalConfig
from train_gpt import (
    LOADER_BYTES,
    Hyperparameters,
    knob_fields,
    pack_source,
    require,
    run_entry_point,
    submission_source,
    write_atomically,
)

MAX_SECONDS = 600.0  # of training, and again of evaluation, in the record track
TRACKS = ("10min_16mb", "non_record_16mb")
TEMPLATE = Path(__file__).with_name("record_readme.md")  # of README.md; knobs by their own names
PAYLOAD = b"PAYLOAD"
LOADER = Path(__file__).with_name("record_loader.txt")  # of the packed source
SCORES = {"sliding": "Sliding", "ttt": "Post-TTT", "ngram": "Post-ngram"}  # by kind
# Settings of a place or of a seed, which do not repeat a run elsewhere.
NOT_REPEATED = {"run_id", "seed", "data_path", "tokenizer_path", "checkpoint_every", "resume"}


def pack_script(source: bytes) -> bytes:
    """Pack the source of train_gpt.py, a NUL and that of eval_sliding.py as a record ships them."""
    packed = pack_source(source)
    loader = LOADER.read_text(encoding="ascii").encode()  # with line ends of Unix
    script = loader.replace(PAYLOAD, packed)
    assert len(script) == LOADER_BYTES + len(packed), f"{len(loader) - len(PAYLOAD)=}"
    return script


def deviation(values: list[float]) -> float | None:
    """Return the standard deviation of a sample; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


# ---- Logs


def line_ends(source: bytes) -> dict[str, bytes]:
    """Return a source with the line ends of Unix and of Windows, by the SHA-256 that logs state."""
    unix = source.replace(b"\r\n", b"\n")
    forms = (unix, unix.replace(b"\n", b"\r\n"))
    return {hashlib.sha256(form).hexdigest(): form for form in forms}


def read_runs(paths: list[Path], source: bytes) -> tuple[list[RunLog], bytes]:
    """Read logs of this trainer, by seed, all made by `source`, and pack that as they ran it.

    Raises ConfigError.
    """
    forms = line_ends(source)
    plain = next(iter(forms.values())).decode().partition("\0")[0]
    runs = [RunLog.read(path) for path in paths]
    script = b""
    for run in runs:
        trained = run.json_events.get("train_summary", {})
        finished = {"steps", "train_seconds", "partial"} <= trained.keys()
        require(finished, f"{run.path}: no finished run of this trainer (train_summary)")
        stated = {"seed": run.seed, "score": run.score, "steps": run.steps or None}
        stated |= {"evaluation": run.json_events.get("eval_summary"), "time": run.eval_seconds}
        stated |= {"float": run.final("float"), "artifact": run.final("roundtrip")}
        stated |= {"bytes": run.bytes_total, "code": run.bytes_code, "model": run.bytes_model}
        stated |= {"parameters": run.params, "torch": run.versions.get("torch")}
        stated |= {"knobs": run.knobs.get("num_layers")}
        missing = ", ".join(name for name, value in stated.items() if value is None)
        require(not missing, f"{run.path}: the log states no {missing}")
        partial = run.score.partial or trained["partial"]
        require(not partial, f"{run.path}: a PARTIAL score, of a part of the split")

        same = run.source == plain and len(run.code_hashes) == 1 and run.code_hashes <= forms.keys()
        commit = run.versions.get("commit")
        require(same, f"{run.path}: made by other code than that of {ROOT}; check out {commit}")
        script = pack_script(forms[min(run.code_hashes)])
        counted = f"{run.path} counts {run.bytes_code:,} bytes of code"
        packed = f"packed it has {len(script):,} here: another liblzma"
        require(run.bytes_code == len(script), f"{counted}, but {packed}")
    seeds = [run.seed for run in runs]
    require(len(set(seeds)) == len(seeds), f"several logs of one seed: {sorted(seeds)}")
    return sorted(runs, key=lambda run: run.seed), script


# ---- README


def seed_table(runs: list[RunLog]) -> str:
    """Return the table of results: a row per seed, and their means."""
    kind = SCORES[runs[0].score.kind]
    header = ["Seed", "Steps", "ms/step", "Pre-quant", "Post-quant", f"{kind} val_bpb"]
    header += ["nats/token", "Artifact bytes", "Total bytes", "Train s", "Eval s"]
    rows, scores = [], []
    for run in runs:
        before, after = run.final("float"), run.final("roundtrip")
        scores.append([before.bpb, after.bpb, run.score.bpb, run.score.loss])
        row = [run.seed, f"{run.steps:,}", f"{1000 * run.train_seconds / run.steps:.1f}"]
        row += [f"{score:.5f}" for score in scores[-1]]
        row += [f"{run.bytes_model:,}", f"{run.bytes_total:,}", f"{run.train_seconds:.1f}"]
        rows.append([*row, f"{run.eval_seconds:.1f}"])

    means = []
    for values in zip(*scores, strict=True):
        std = deviation(values)
        spread = "(n=1)" if std is None else f"+- {std:.5f}"
        means.append(f"{statistics.fmean(values):.5f} {spread}")
    largest = max(run.bytes_total for run in runs)
    rows.append(["**Mean**", "", "", *means, "", f"{largest:,} (max)", "", ""])
    return markdown_table(header, rows)


def comparison(runs: list[RunLog], other: Baseline | None) -> str:
    """Compare with the previous row: in bits per byte, in nats per token, and by both bars."""
    if other is None:
        return "There is no previous row of this text, tokenizer and budget to compare with."
    nats = statistics.fmean(run.nats_per_bpb for run in runs)
    verdict, _ = other.compare([run.score.bpb for run in runs], nats)
    return f"{other.name}, n = {len(other.seeds) or '?'}: {other.val_bpb:.5f}. {verdict}"


def environment(run: RunLog) -> dict[str, str]:
    """Return the variables that repeat a run: knobs off their default, and its evaluation's."""
    knobs = knob_fields(Hyperparameters) | knob_fields(EvalConfig)
    defaults = {name: str(knob.default) for name, knob in knobs.items()}
    stated = {name: value for name, value in run.knobs.items() if name not in NOT_REPEATED}
    stated |= {name: value for name, value in run.evaluation.items() if name in defaults}
    stated["eval_stride"] = run.evaluation.get("stride", defaults["eval_stride"])
    window = run.evaluation.get("window", run.knobs["train_seq_len"])
    if window != run.knobs["train_seq_len"]:
        stated["eval_seq_len"] = window

    shown = {}
    for name, value in stated.items():
        if value != defaults.get(name):
            shown[name.upper()] = {"True": "1", "False": "0"}.get(value, value)
    return shown


def headline(runs: list[RunLog]) -> str:
    """Return the line under the title: score, size, hardware and seconds."""
    scores = [run.score.bpb for run in runs]
    std = deviation(scores)
    count = "n=1" if std is None else f"{len(runs)}-seed mean, std {std:.4f}"
    size = f"{max(run.bytes_total for run in runs) / 1e6:.2f} MB"
    spent = f"{runs[0].hardware}, {max(run.train_seconds for run in runs):.0f} s"
    return f"**val_bpb: {statistics.fmean(scores):.5f}** ({count}) | {size} | {spent}"


def readme(
    about: argparse.Namespace, runs: list[RunLog], baseline: Baseline | None, has_picture: bool
) -> str:
    """Fill in the template of README.md; every figure comes from the logs."""
    first = runs[0]
    audit = "Not audited: `python train_gpt.py eval_sliding.py --audit ARTIFACT` does it."
    for run in reversed(runs):
        if run.audit:
            audit = f"`--audit` of the artifact of seed {run.seed}:\n\n{run.audit.rstrip()}"

    settings = [f"{name}={value}" for name, value in environment(first).items()]
    threads = re.fullmatch(r"CPU, \d+ process\w* of (\d+) threads?", first.hardware)
    if threads:  # they decide how sums are rounded
        settings.insert(0, f"OMP_NUM_THREADS={threads[1]}")
    world = first.world_size or 1
    launch = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
    return string.Template(TEMPLATE.read_text(encoding="ascii")).substitute(
        first.knobs,
        title=about.name,
        headline=headline(runs),
        blurb=about.blurb,
        results=seed_table(runs),
        dataset=first.dataset,
        text=f"{first.targets:,} targets, {first.scored_bytes:,} bytes of text",
        bytes_code=f"{first.bytes_code:,}",
        picture="![training curves](training.png)\n\n" if has_picture else "",
        comparison=comparison(runs, baseline),
        params=f"{first.params:,}",
        window=first.evaluation.get("window"),
        stride=first.evaluation.get("stride"),
        ttt=first.evaluation.get("ttt"),
        ngram=first.evaluation.get("ngram", "off"),
        audit=audit,
        versions=", ".join(f"{name} {value}" for name, value in first.versions.items()),
        settings=" \\\n    ".join(textwrap.wrap(" ".join(settings), 110)),
        seeds=" ".join(str(run.seed) for run in runs),
        launch=launch,
    )


# ---- Folder


def submission(runs: list[RunLog]) -> dict:
    """Return the figures of submission.json, with the keys that accepted records use."""
    bpb, loss = [run.score.bpb for run in runs], [run.score.loss for run in runs]
    before = [run.final("float") for run in runs]
    results = {}
    for run in runs:
        results[str(run.seed)] = {
            "val_loss": run.score.loss,
            "val_bpb": run.score.bpb,
            "artifact_bytes": run.bytes_model,
            "steps": run.steps,
            "train_time_s": round(run.train_seconds, 1),
            "eval_time_s": run.eval_seconds,
        }
    return {
        "val_loss": statistics.fmean(loss),
        "val_bpb": statistics.fmean(bpb),
        "val_loss_std": deviation(loss),
        "val_bpb_std": deviation(bpb),
        "pre_quant_val_loss": statistics.fmean(row.loss for row in before),
        "pre_quant_val_bpb": statistics.fmean(row.bpb for row in before),
        "seeds": [run.seed for run in runs],
        "seed_results": results,
        "bytes_total": max(run.bytes_total for run in runs),
        "bytes_code": runs[0].bytes_code,
        "bytes_model": max(run.bytes_model for run in runs),
        "step_stop": round(statistics.fmean(run.steps for run in runs)),
        "wallclock_seconds": round(max(run.train_seconds for run in runs), 1),
        "eval_time_seconds": max(run.eval_seconds for run in runs),
        "hardware": runs[0].hardware,
        "pytorch_version": runs[0].versions["torch"],
    }


def requirements(run: RunLog) -> str:
    """Return the requirements of this repository, torch and numpy as the log states them."""
    pinned = (ROOT / "requirements.txt").read_text(encoding="ascii")
    for name in ("torch", "numpy"):
        version = run.versions[name].split("+")[0]
        pinned = re.sub(rf"^{name}==.*\n", "", pinned, flags=re.M) + f"{name}=={version}\n"
    return pinned


def make(
    about: argparse.Namespace, runs: list[RunLog], baseline: Baseline | None, script: bytes
) -> None:
    """Make the folder about.final, under its name at once or not at all.

    The picture is drawn where matplotlib is installed.
    """
    about.final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{about.final.name}.", dir=about.final.parent))
    try:
        write_atomically(work / "train_gpt.py", script)
        for run in runs:
            write_atomically(work / f"train_seed{run.seed}.log", run.path.read_bytes())
        write_atomically(work / "requirements.txt", requirements(runs[0]).encode())
        keys = ("author", "github_id", "name", "blurb", "date", "track")
        figures = {key: str(vars(about)[key]) for key in keys} | submission(runs)
        write_atomically(work / "submission.json", (json.dumps(figures, indent=2) + "\n").encode())
        has_picture = importlib.util.find_spec("matplotlib") is not None
        if has_picture:
            draw(runs, work / "training.png")
        text = readme(about, runs, baseline, has_picture)
        write_atomically(work / "README.md", text.encode("ascii"))
        work.chmod(0o755)
        os.rename(work, about.final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


# ---- Command line


def git_user() -> str:
    """Return git's user.name, "unknown" where there is none."""
    status, name = subprocess.getstatusoutput("git config user.name")
    return name if status == 0 and name else "unknown"


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises ConfigError; exits with 0 after --help."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--name", required=True, help="of the folder, after the date: letters, digits, . _ + -")
    add("--logs", nargs="*", default=[], type=Path, metavar="LOG", help="a finished log per seed")
    add("--dry-run", action="store_true", help="check everything but the logs, and make nothing")
    add("--track", choices=TRACKS, default="non_record_16mb")
    add("--previous", metavar="ROW", help="a PR, best, a log or a records folder")
    add("--author", default=git_user(), help="default: git's user.name")
    add("--github-id", help="default: the author")
    blurb = "Token-routed MoE with exact dispatch and mu-guidance."
    add("--blurb", default=blurb, help="one sentence")
    add("--date", type=date.fromisoformat, default=date.today(), help="YYYY-MM-DD; default: today")
    add("--output", type=Path, default=ROOT / "records", metavar="DIR", help="default: records/")
    add("--allow-commit", action="store_true", help="a commit that is dirty or unknown, or several")
    args = parser.parse_args()

    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", args.name)
    require(plain, f"--name {args.name!r}: letters, digits, . _ + - only, and no . at the start")
    args.github_id = args.github_id or args.author
    texts = {"author": args.author, "github-id": args.github_id, "blurb": args.blurb}
    for name, text in texts.items():
        one_line = text.isascii() and text.isprintable() and text.strip()
        require(one_line, f"--{name} {text!r}: one line of ASCII text")
    require(args.logs or args.dry_run, "--logs: name one finished log per seed")
    return args


def main() -> None:
    """Make the folder and print its name. Raises ConfigError."""
    args = parse_arguments()
    args.final = args.output / f"track_{args.track}" / f"{args.date}_{args.name}"
    free = f"{args.final} exists already; take another --name or --date, or remove it"
    require(not args.final.exists(), free)
    previous = args.previous or ("best" if args.track == TRACKS[0] else None)
    baseline = find_baseline(previous) if previous else None
    if args.dry_run:
        return

    runs, script = read_runs(args.logs, submission_source())
    commits = {run.versions.get("commit", "unknown") for run in runs}
    clean = len(commits) == 1 and not re.search(r"^unknown|-dirty$", *commits)
    stated = f"made at commit {', '.join(sorted(commits))}: one that is clean repeats it"
    require(clean or args.allow_commit, f"{stated} (--allow-commit makes the folder all the same)")
    if baseline is not None:
        require(baseline.same_text(runs[0]), f"{previous}: validated on another text")

    make(args, runs, baseline, script)
    print(headline(runs))
    print(f"author {args.author}, github_id {args.github_id}")
    print("records/check_record.py reads it as a reviewer does")
    print(args.final)


if __name__ == "__main__":
    run_entry_point(main)

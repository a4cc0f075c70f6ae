"""Make a records folder out of the logs of several seeds: the paperwork of a submission, from the logs alone.

    python records/make_record.py --name TokenRouted --logs logs/seed*.txt
    python records/make_record.py --name TokenRouted --logs logs/seed*.txt --track 10min_16mb --previous 1394 \\
        --author "A. Name" --github-id aname --blurb "what is new, in a sentence"

The folder records/track_<track>/<date>_<Name>/ gets README.md, submission.json, train_seed<SEED>.log, requirements.txt,
a plot, and train_gpt.py: train_gpt.py and eval_sliding.py in one ASCII script, whose source is that which the logs say
they ran, byte for byte, and whose size is the one they count. --previous names what to compare with: a row of
leaderboard.csv by its PR, "best", or logs, or a records folder.

Refused, unless the --allow option of that name makes it an exception that the README states: seeds of different
configurations, a log without the line of eval_sliding.py, code + model over the cap, training or evaluation of 600 s or
more in the track 10min_16mb, a PARTIAL score, a commit that is dirty or unknown.
"""

import argparse
import dataclasses
import datetime
import getpass
import hashlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from leaderboard import Baseline, find_baseline
from runlog import Run

from train_gpt import (
    LOADER_BYTES,
    MAX_SUBMISSION_BYTES,
    Hyperparameters,
    Refusal,
    pack_source,
    require,
    run_entry_point,
    submission_source,
    write_atomically,
)

ROOT = Path(__file__).resolve().parents[1]
MAX_SECONDS = 600.0  # of training, and again of evaluation, in the record track
TRACKS = ("10min_16mb", "non_record_16mb")
LOADER = (
    b'''"""train_gpt.py and eval_sliding.py in one file, xz in base85, unpacked exactly as they were run to a private
temporary folder.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                                    # trains and exports
    torchrun --standalone --nproc_per_node=8 train_gpt.py eval_sliding.py logs/RUN_ID.ptz    # scores an artifact
    python -c 'import train_gpt as t; print(t.submission_source().decode())'                 # prints the sources
"""

import atexit
import base64
import lzma
import os
import shutil
import sys
import tempfile

sources = lzma.decompress(base64.b85decode("''',
    b"""")).split(b"\\0")
folder = tempfile.mkdtemp(prefix="train_gpt_")
atexit.register(shutil.rmtree, folder, ignore_errors=True)
sys.path.insert(0, folder)
paths = [os.path.join(folder, name) for name in ("train_gpt.py", "eval_sliding.py")]
for path, source in zip(paths, sources):  # real files, which torch.compile, Triton and tracebacks look up
    with open(path, "wb") as file:
        file.write(source)
scores = __name__ == "__main__" and sys.argv[1:2] == ["eval_sliding.py"]
if scores:
    del sys.argv[0]
__file__ = paths[scores]
exec(compile(sources[scores], __file__, "exec"))
""",
)
EXCEPTIONS = {
    "mixed": "seeds of different configurations",
    "unscored": "a log without the line of eval_sliding.py",
    "cap": f"code + model of {MAX_SUBMISSION_BYTES:,} bytes or more",
    "time": f"training or evaluation of {MAX_SECONDS:.0f} s or more, or resumed, in the track 10min_16mb",
    "partial": "a PARTIAL score",
    "commit": "a commit that is dirty or unknown, or several",
}
SCORES = {
    "sliding": "Sliding",
    "ttt": "Post-TTT",
    "roundtrip": "Post-quant",
}  # by kind of the final score


@dataclass(frozen=True)
class Record:
    """What a folder is made of."""

    name: str
    track: str
    date: str
    author: str
    github_id: str
    blurb: str
    runs: list[Run]
    baseline: Baseline | None
    exceptions: list[str]

    @property
    def metric(self) -> str:
        """PARTIAL_bpb for a part of the split, which is never called val_bpb."""
        return "PARTIAL_bpb" if any(run.score.partial for run in self.runs) else "val_bpb"

    @property
    def scores(self) -> list[float]:
        return [run.score.bpb for run in self.runs]


def pack_script(source: bytes) -> bytes:
    """The script that a record ships, for the source of train_gpt.py, a NUL, and that of eval_sliding.py."""
    script = pack_source(source).join(LOADER)
    assert len(script) == LOADER_BYTES + len(pack_source(source)), (
        "LOADER_BYTES is not the length of LOADER"
    )
    return script


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def deviation(values: list[float]) -> float | None:
    """Of a sample; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


# ---- What is refused


def differences(runs: list[Run]) -> list[str]:
    """What is not the same in all runs of a record, and what it is in each."""
    found = []
    facts = [
        run.configuration
        | {f"evaluation {name}": value for name, value in run.evaluation.items()}
        | {"validation targets": str(run.targets), "validation bytes": str(run.scored_bytes)}
        | {
            "code": " ".join(sorted(run.code_hashes)),
            "dataset": dataset_of(run),
            "hardware": run.hardware,
        }
        for run in runs
    ]
    for name in sorted(set().union(*facts)):
        values = [fact.get(name, "not stated") for fact in facts]
        if len(set(values)) > 1:
            stated = (
                f"{value[:40]} ({run.path.name})" for value, run in zip(values, runs, strict=True)
            )
            found.append(f"{name}: {', '.join(stated)}")
    return found


def dataset_of(run: Run) -> str:
    found = re.search(r"^train_loader:dataset:(\S+)", run.text, re.M)
    return found[1] if found else "unknown"


def objections(runs: list[Run], track: str) -> list[tuple[str, str]]:
    """Name of the exception it would need, and what is wrong."""
    found = [("mixed", f"the seeds differ in {difference}") for difference in differences(runs)]
    for run in runs:
        seconds = {"training": run.train_seconds, "evaluation": run.eval_seconds}
        if "eval_summary" not in run.json_events:
            found.append(("unscored", f"{run.path}: no line of eval_sliding.py"))
        if run.score.partial or run.json_events["train_summary"]["partial"]:
            found.append(
                ("partial", f"{run.path}: a PARTIAL score, of a part of the validation split")
            )
        if run.bytes_total >= MAX_SUBMISSION_BYTES:
            found.append(
                (
                    "cap",
                    f"{run.path}: {run.bytes_total:,} bytes, the cap is {MAX_SUBMISSION_BYTES:,}",
                )
            )
        for what, spent in seconds.items() if track == "10min_16mb" else ():
            if spent is None or spent >= MAX_SECONDS:
                took = "an unstated time" if spent is None else f"{spent:.3f} s"
                found.append(
                    (
                        "time",
                        f"{run.path}: {what} took {took}, less than {MAX_SECONDS:.0f} s are allowed",
                    )
                )
        if run.resumed and track == "10min_16mb":
            found.append(
                (
                    "time",
                    f"{run.path}: the training was interrupted and resumed; a timed run is one run",
                )
            )
        commit = run.versions.get("commit", "unknown")
        if commit == "unknown" or commit.endswith("-dirty"):
            found.append(("commit", f"{run.path}: made at commit {commit}"))
    commits = sorted({run.versions.get("commit", "unknown") for run in runs})
    if len(commits) > 1:
        found.append(("commit", f"the seeds were made at several commits: {', '.join(commits)}"))
    return found


def read_runs(paths: list[Path], source: bytes) -> list[Run]:
    """The logs as runs of this trainer by seed, all made by `source`. Raises Refusal."""
    runs, digest, script = (
        [Run.read(path) for path in paths],
        hashlib.sha256(source).hexdigest(),
        pack_script(source),
    )
    for run in runs:
        finished = {"steps", "train_seconds", "partial"} <= run.json_events.get(
            "train_summary", {}
        ).keys()
        require(finished, f"{run.path}: no finished run of this trainer (train_summary)")
        stated = {
            "seed": run.seed,
            "score": run.score,
            "bytes": run.bytes_total,
            "code": run.bytes_code,
        }
        stated |= {
            "parameters": run.params,
            "float": run.final("float"),
            "artifact": run.final("roundtrip"),
        }
        stated |= {"steps": run.steps, "model": run.bytes_model, "torch": run.versions.get("torch")}
        stated |= {"knobs": run.knobs.get("num_layers")}
        missing = [name for name, value in stated.items() if value is None]
        require(
            not missing and run.steps > 0,
            f"{run.path}: the log states no {', '.join(missing) or 'steps'}",
        )
        same = f"{run.path}: made by other code than that of {ROOT}; check out commit {run.versions.get('commit')}"
        require(run.code_hashes == {digest} and run.source.encode() == source.split(b"\0")[0], same)
        counted = f"{run.path} counts {run.bytes_code:,} bytes of code, but packed it has {len(script):,} here"
        require(run.bytes_code == len(script), f"{counted}: another liblzma")
    seeds = [run.seed for run in runs]
    require(len(set(seeds)) == len(seeds), f"several logs of one seed: {sorted(seeds)}")
    return sorted(runs, key=lambda run: run.seed)


# ---- README


def table(header: str, rows: list[list[str]]) -> str:
    """Markdown, for column titles separated by bars."""
    lines = [f"| {header} |", "|" + "---|" * (header.count("|") + 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation, or that there is only one."""
    std = deviation(values)
    return (
        f"{mean(values):.{digits}f} (n=1)"
        if std is None
        else f"{mean(values):.{digits}f} +- {std:.{digits}f}"
    )


def figures(run: Run) -> list[float]:
    """A run's float score, that of the artifact, the final one, nats per token, and bytes of the artifact."""
    before, after = run.final("float"), run.final("roundtrip")
    return [before.bpb, after.bpb, run.score.bpb, run.score.loss, run.bytes_model]


def seed_table(record: Record) -> str:
    runs, kind = record.runs, SCORES[record.runs[0].score.kind]
    header = (
        f"Seed | Steps | ms/step | Pre-quant | Post-quant | {kind} {record.metric} | nats/token | "
    )
    rows = []
    for run in runs:
        before, after, score, loss, model = figures(run)
        times = [
            f"{seconds:.1f}" if seconds is not None else "-"
            for seconds in (run.train_seconds, run.eval_seconds)
        ]
        cells = [str(run.seed), f"{run.steps:,}", f"{1000 * run.train_seconds / run.steps:.1f}"]
        cells += [
            f"{before:.5f}",
            f"{after:.5f}",
            f"{score:.5f}",
            f"{loss:.5f}",
            f"{model:,}",
            f"{run.bytes_total:,}",
        ]
        rows.append([*cells, *times])
    means = [spread(list(values), 5) for values in list(zip(*map(figures, runs), strict=True))[:4]]
    rows.append(
        ["**Mean**", "", "", *means, "", f"{max(run.bytes_total for run in runs):,} (max)", "", ""]
    )
    return table(header + "Artifact bytes | Total bytes | Train s | Eval s", rows)


def comparison(record: Record) -> str:
    """Against the previous row: differences in bits per byte and in nats per token, and the test of both bars."""
    if record.baseline is None:
        return "There is no previous row of this text, tokenizer and budget to compare with."
    other, runs = record.baseline, record.runs
    result = other.compare(record.scores, mean([run.nats_per_bpb for run in runs]))
    rows = [
        [
            f"this record (n={len(runs)})",
            f"{mean(record.scores):.5f}",
            f"{mean([r.score.loss for r in runs]):.5f}",
        ]
    ]
    loss = f"{other.val_loss:.5f}" if other.val_loss is not None else "-"
    rows += [[f"{other.name} (n={len(other.seeds) or '?'})", f"{other.val_bpb:.5f}", loss]]
    rows += [["difference", f"{result.bpb:+.5f}", f"{result.nats:+.5f}"]]
    return table(f"run | {record.metric} | nats/token", rows) + f"\n\n{result.verdict}"


def architecture(run: Run) -> str:
    """Parts that this configuration has, and where they are from."""
    knobs = run.knobs

    def on(name: str) -> bool:
        return knobs[name] == "True"

    shape = (
        f"{knobs['num_layers']} layers x {knobs['model_dim']}, {knobs['num_heads']} heads of which "
    )
    shape += f"{knobs['num_kv_heads']} for keys and values, tied embedding of {knobs['vocab_size']} pieces, "
    shape += f"sequences of {knobs['train_seq_len']}, {run.params:,} parameters"
    routed = f"shared expert of {knobs['shared_dim']} units and {knobs['num_experts']} x {knobs['expert_dim']} routed, "
    routed += f"`ROUTING={knobs['routing']}`: a table frozen before the first step gives each token its expert"
    if knobs["routing"] == "dense":
        routed = f"dense, {int(knobs['shared_dim']) + int(knobs['num_experts']) * int(knobs['expert_dim'])} units"
    loop = f"layers {knobs['loop_start']}-{knobs['loop_end']} run {knobs['loop_passes']} times, "
    loop += f"from {knobs['loop_from']} of the budget"
    quantized = (
        f"int{knobs['matrix_bits']} matrices, int{knobs['embed_bits']} embedding, one step per row"
    )
    rows = [
        ("Transformer", shape, "naive baseline"),
        ("MLP", routed, "Complexity-ML (PR #224), here with exact dispatch"),
        (
            "Mu-guidance",
            f"`MU={knobs['mu']}`: each layer biases q, k and v of the next",
            "Complexity-ML",
        ),
        (
            "Activation",
            knobs["activation"],
            "PR #493, slope PR #1948" if "leaky" in knobs["activation"] else "-",
        ),
        ("Exclusive self attention", "all layers", "PR #478") if on("xsa") else None,
        ("Attention gate", "per head, 12 channels", "PR #1787") if on("attn_gate") else None,
        ("SmearGate", "stops at a document's first token", "PR #1667, #1851")
        if on("smear_gate")
        else None,
        ("Layer scale", "1 / sqrt(l + 1)", "PR #287") if on("ln_scale") else None,
        ("Skip gates", "U-Net skips by sigmoid", "PR #1089") if on("skip_gates") else None,
        ("Depth recurrence", loop, "PR #1204, #1394") if int(knobs["loop_passes"]) > 1 else None,
        (
            "Optimizer",
            f"Muon {knobs['matrix_lr']}, AdamW; row-normalised, Polar Express",
            "PR #1217, #1787",
        ),
        (
            "Schedule",
            f"`SCHEDULE={knobs['schedule']}`, floor {knobs['min_lr']}, {knobs['average']}",
            "PR #287, #1787",
        ),
        ("Quantization", quantized, "GPTQ PR #1019, SDClip PR #1394"),
        (
            "Evaluation",
            f"window {run.evaluation.get('window')}, stride {run.evaluation.get('stride')}",
            "PR #50",
        ),
    ]
    if run.score.kind == "ttt":
        rows.append(("Test-time training", "score first, SGD after", "PR #1413"))
    return table("part | setting | source", [list(row) for row in rows if row])


COMPLIANCE = {
    "C1 causal": "a token's expert, mask and mu depend on the artifact and on tokens before the target alone",
    "C2 normalised": "a softmax over the whole vocabulary, complete before the target is looked at",
    "C3 score before update": "a chunk is scored before anything learns from it; without TTT nothing is learnt",
    "C4 single pass": "a counter on every target asserts that each was scored once",
}


def compliance(record: Record) -> str:
    """The four conditions of upstream issue #1017 and, where a log has it, what the audit of the artifact found."""
    text = table("condition | how", [[name, how] for name, how in COMPLIANCE.items()])
    audited = [run for run in record.runs if run.audit]
    if not audited:
        return (
            text
            + "\n\nNot audited: `python train_gpt.py eval_sliding.py --audit ARTIFACT` does it."
        )
    rows = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in audited[0].audit]
    lead = f"`--audit` of the artifact of seed {audited[0].seed}:"
    return f"{text}\n\n{lead}\n\n" + table("condition | test | finding | result", rows)


def environment(run: Run) -> dict[str, str]:
    """The variables that repeat a run: knobs that are not the default, and those of its evaluation."""
    defaults = {field.name: str(field.default) for field in dataclasses.fields(Hyperparameters)}
    own = {name: value for name, value in run.knobs.items() if value != defaults.get(name)}
    own |= {
        name: value
        for name, value in run.evaluation.items()
        if name.startswith("ttt") and value != defaults[name]
    }
    window, stride = run.evaluation.get("window"), run.evaluation.get("stride")
    own |= {"eval_stride": stride} if stride not in (None, defaults["eval_stride"]) else {}
    own |= {"eval_seq_len": window} if window not in (None, run.knobs["train_seq_len"]) else {}
    skipped = ("run_id", "seed", "data_path", "tokenizer_path", "checkpoint_every", "resume")
    shown = {name.upper(): value for name, value in own.items() if name not in skipped}
    return {name: {"True": "1", "False": "0"}.get(value, value) for name, value in shown.items()}


def run_command(record: Record) -> str:
    first = record.runs[0]
    world, seeds = first.world_size or 1, " ".join(str(run.seed) for run in record.runs)
    launch = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
    name, vocab = dataset_of(first), first.knobs["vocab_size"]
    threads = re.fullmatch(
        r"CPU, \d+ process\w* of (\d+) threads?", first.hardware
    )  # decide the rounding of sums
    export = f"export OMP_NUM_THREADS={threads[1]} " if threads else "export "
    settings = textwrap.wrap(
        " ".join(f"{key}={value}" for key, value in environment(first).items()), 110
    )
    lines = [
        "pip install -r requirements.txt",
        f"export DATA_PATH=data/datasets/{name} TOKENIZER_PATH=data/tokenizers/fineweb_{vocab}_bpe.model",
        export + " \\\n    ".join(settings),
        f"for SEED in {seeds}; do",
        f"  SEED=$SEED RUN_ID=seed$SEED {launch} train_gpt.py",
        f"  {launch} train_gpt.py eval_sliding.py logs/seed$SEED.ptz",
        "done",
    ]
    return "```bash\n" + "\n".join(lines) + "\n```"


def headline(record: Record) -> str:
    runs, std = record.runs, deviation(record.scores)
    count = f"{len(runs)}-seed mean, std {std:.4f}" if std is not None else "n=1"
    seconds = max(run.train_seconds for run in runs)
    size = f"{max(run.bytes_total for run in runs) / 1e6:.2f} MB"
    return f"**{record.metric}: {mean(record.scores):.5f}** ({count}) | {size} | {runs[0].hardware}, {seconds:.0f} s"


def readme(record: Record, files: list[str]) -> str:
    """The whole README.md; every figure comes from the logs."""
    first = record.runs[0]
    versions = ", ".join(
        f"{name} {value}" for name, value in first.versions.items() if name != "commit"
    )
    targets = f"{first.targets:,} targets"
    targets += f", {first.scored_bytes:,} bytes of text" if first.scored_bytes else ""
    what = {
        "train_gpt.py": "train_gpt.py and eval_sliding.py, packed; what the logs ran, byte for byte"
    }
    what |= {
        "submission.json": "the same figures for tools",
        "requirements.txt": "versions of the run",
    }
    what |= {"training.png": "curves and byte budget"}
    listed = "\n".join(f"- `{name}`{': ' + what[name] if name in what else ''}" for name in files)
    picture = "\n![training curves](training.png)\n" if "training.png" in files else ""
    exceptions = "\n".join(f"- {text}" for text in record.exceptions)
    exceptions = (
        f"\n## Exceptions\n\nThis record was made in spite of:\n\n{exceptions}\n"
        if exceptions
        else ""
    )
    return f"""# {record.name}

{headline(record)}

{record.blurb}

## Results

{seed_table(record)}

Dataset {dataset_of(first)}, {targets}. Total bytes are the artifact's and {first.bytes_code:,} of code, the size of
train_gpt.py in this folder. Train s includes the collection of GPTQ's Hessians; Eval s is all of eval_sliding.py.
{picture}{exceptions}
## Against the previous row

{comparison(record)}

## Architecture

{architecture(first)}

## Compliance

{compliance(record)}

No validation text is read in training, calibration, routing tables or compilation; what is scored is the file.

## Requirements

{versions}; commit {first.versions.get("commit", "unknown")}. `pip install -r requirements.txt`. The log names the
attention kernel; without FlashAttention-3 it is cuDNN's or PyTorch's.

## Run command

{run_command(record)}

## Files

{listed}

## Credits

nanoGPT and modded-nanogpt (Muon), the naive baseline and the records of openai/parameter-golf that the table above
names, Complexity-ML (token routing, mu-guidance).
"""


# ---- Folder


def submission(record: Record) -> dict:
    """submission.json, with the keys that accepted records use; null where a PARTIAL score has no val_bpb."""
    runs, whole = record.runs, record.metric == "val_bpb"
    results = {}
    for run in runs:
        results[str(run.seed)] = {
            "val_loss": run.score.loss if whole else None,
            "val_bpb": run.score.bpb if whole else None,
            "artifact_bytes": run.bytes_model,
            "steps": run.steps,
            "step_avg_ms": round(1000 * run.train_seconds / run.steps, 2),
            "train_time_s": round(run.train_seconds, 1),
            "eval_time_s": run.eval_seconds,
        }
    losses, before = [run.score.loss for run in runs], [run.final("float") for run in runs]
    slowest = max(run.train_seconds for run in runs)
    evaluated = [run.eval_seconds for run in runs if run.eval_seconds is not None]
    largest = max(run.bytes_total for run in runs)
    return {
        "author": record.author,
        "github_id": record.github_id,
        "name": record.name,
        "blurb": record.blurb,
        "date": record.date,
        "track": record.track,
        "val_loss": mean(losses) if whole else None,
        "val_bpb": mean(record.scores) if whole else None,
        "val_loss_std": deviation(losses) if whole else None,
        "val_bpb_std": deviation(record.scores) if whole else None,
        "pre_quant_val_loss": mean([row.loss for row in before]) if whole else None,
        "pre_quant_val_bpb": mean([row.bpb for row in before]) if whole else None,
        "seeds": [run.seed for run in runs],
        "seed_results": results,
        "bytes_total": largest,
        "bytes_code": runs[0].bytes_code,
        "bytes_model": max(run.bytes_model for run in runs),
        "step_stop": round(mean([run.steps for run in runs])),
        "wallclock_seconds": round(slowest, 1),
        "eval_time_seconds": max(evaluated) if evaluated else None,
        "hardware": runs[0].hardware,
        "pytorch_version": runs[0].versions["torch"],
        "compliance": {
            "train_under_600s": slowest < MAX_SECONDS,
            "artifact_under_16mb": largest < MAX_SUBMISSION_BYTES,
            "eval_under_600s": bool(evaluated) and max(evaluated) < MAX_SECONDS,
            "three_seeds": len(runs) >= 3,
            "score_first_ttt": all(run.score.kind == "ttt" for run in runs),
            "no_slot": True,
            "no_pre_quant_ttt": True,
            "no_etlb": True,
            "no_ngram_cache": True,
        },
        "attribution": {
            "token_routing": "Complexity-ML",
            "baseline": "openai/parameter-golf",
            "muon": "Keller Jordan",
        },
    }


def requirements(run: Run) -> str:
    """The packages that the script imports, in the versions of the run as far as its log states them."""
    stated = {
        name: version.split("+")[0]
        for name, version in run.versions.items()
        if name in ("torch", "numpy")
    }
    pinned = re.findall(
        r"^(sentencepiece|zstandard|brotli)(==\S+)$", (ROOT / "requirements.txt").read_text(), re.M
    )
    return "".join(f"{name}=={version}\n" for name, version in stated.items()) + "".join(
        f"{n}{v}\n" for n, v in pinned
    )


def write_folder(record: Record, script: bytes, folder: Path) -> None:
    """Everything, into an existing folder."""
    contents: dict[str, bytes] = {"train_gpt.py": script}
    contents |= {f"train_seed{run.seed}.log": run.path.read_bytes() for run in record.runs}
    contents["requirements.txt"] = requirements(record.runs[0]).encode()
    contents["submission.json"] = (json.dumps(submission(record), indent=2) + "\n").encode()
    for name, data in contents.items():
        write_atomically(folder / name, data)
    if importlib.util.find_spec("matplotlib"):
        from plot import draw

        draw(record.runs, folder / "training.png")
    files = sorted([*(path.name for path in folder.iterdir()), "README.md"])
    write_atomically(folder / "README.md", readme(record, files).encode("ascii"))


def make(record: Record, script: bytes, final: Path) -> None:
    """The finished folder, under its name at once or not at all."""
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        write_folder(record, script, work)
        work.chmod(0o755)
        os.rename(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


# ---- Command line


def git_config(key: str) -> str:
    try:
        return subprocess.run(
            ["git", "config", key], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
    except OSError:
        return ""


def parse_arguments(
    describe: Callable[..., argparse.ArgumentParser] = argparse.ArgumentParser,
) -> argparse.Namespace:
    """The command line. Raises Refusal; exits with 0 after --help."""
    parser = describe(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: require(False, f"{message} (--help shows examples)")
    parser.add_argument(
        "--name", required=True, help="of the folder, after the date: letters, digits and . _ + -"
    )
    parser.add_argument(
        "--logs", nargs="*", default=[], type=Path, metavar="LOG", help="one finished log per seed"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything but the logs, and make nothing"
    )
    parser.add_argument("--track", choices=TRACKS, default="non_record_16mb")
    parser.add_argument(
        "--previous", nargs="+", metavar="ROW", help="a PR, best, logs or a records folder"
    )
    author = git_config("user.name") or getpass.getuser()
    parser.add_argument("--author", default=author, help="default: git's user.name")
    parser.add_argument(
        "--github-id", default=git_config("github.user"), help="default: github.user, or the author"
    )
    parser.add_argument(
        "--blurb",
        default="Token-routed MoE with exact dispatch and mu-guidance.",
        help="one sentence",
    )
    parser.add_argument(
        "--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD; default: today"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "records", metavar="DIR", help="default: records/"
    )
    for name, what in EXCEPTIONS.items():
        parser.add_argument(
            f"--allow-{name}", action="append_const", const=name, dest="allowed", help=what
        )
    args = parser.parse_args()
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", args.name)
    require(plain, f"--name {args.name!r}: letters, digits, . _ + - only, and no . at the start")
    try:
        require(len(args.date) == 10, f"--date {args.date}: expected YYYY-MM-DD")
        datetime.date.fromisoformat(args.date)
    except ValueError:
        raise Refusal(f"--date {args.date}: expected YYYY-MM-DD") from None
    args.github_id = args.github_id or args.author
    for name in ("author", "github_id", "blurb"):
        text = getattr(args, name)
        one_line = text.isascii() and text.isprintable() and text.strip()
        require(one_line, f"--{name.replace('_', '-')} {text!r}: one line of ASCII text")
    require(args.logs or args.dry_run, "--logs: name one finished log per seed")
    return args


def main() -> None:
    """Make the folder and print its name. Raises Refusal."""
    args = parse_arguments()
    source, final = (
        submission_source(),
        args.output / f"track_{args.track}" / f"{args.date}_{args.name}",
    )
    require(
        not final.exists(), f"{final} exists already; take another --name or --date, or remove it"
    )
    previous = args.previous or (["best"] if args.track == "10min_16mb" else [])
    baseline, exceptions = find_baseline(previous) if previous else None, []
    if args.dry_run:
        return
    runs = read_runs(args.logs, source)
    for name, text in objections(runs, args.track):
        require(
            name in (args.allowed or []),
            f"{text} (--allow-{name} makes it an exception that the README states)",
        )
        exceptions.append(text)
    require(
        baseline is None or baseline.same_text(runs[0]),
        f"{' '.join(previous)}: validated on another text",
    )
    about = args.author, args.github_id, args.blurb
    record = Record(args.name, args.track, args.date, *about, runs, baseline, exceptions)
    make(record, pack_script(source), final)
    print(headline(record))
    print(
        f"author {args.author}, github_id {args.github_id}; records/check_record.py reads it as a reviewer does"
    )
    print(final)


if __name__ == "__main__":
    run_entry_point(main)

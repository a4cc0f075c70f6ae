"""Read training logs of this trainer and of both upstream dialects into one form.

    python records/runlog.py logs/*.txt          # one line per log: what was understood of it
    python records/runlog.py --summary LOG       # the closing table of run_8xh100.sh

The upstream dialects are those of openai/parameter-golf: `step:N/M train_loss:F train_time:Nms` or
`step:N/M loss:F ... t:Nms` until April 2026, and `N/M train_loss: F train_time: F.Fm tok/s: N`
since (PR #1218). Nothing is guessed from file names. What a log does not say is None or empty.
"""

import contextlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from common import NUMBER, ArgumentParser, last_match

from train_gpt import MAX_SUBMISSION_BYTES, require, run_entry_point

RULE = "=" * 100  # ends the source at the head of a log
STEP = re.compile(r"^(?:step:)?(\d+)/(\d+) (.*)$", re.M)
LABEL = r"([A-Za-z][\w +/-]*?):?(?: stride:\d+)?"
SCORES = rf"(val|PARTIAL)_loss:\s*{NUMBER} +\w+_bpb:\s*{NUMBER}"
FINAL = re.compile(rf"^{LABEL} {SCORES}(.*)$", re.M)
KINDS = {  # of final scores, by their labels
    "float": r"pre-quantization|post_ema",
    "ngram": "ngram",
    "ttt": "ttt",
    "sliding": "sliding",
    "roundtrip": "roundtrip|quantized",
}
# Where a run lay, which process it was, how its files are called and when it saved.
NOT_CONFIGURATION = re.compile(
    r"seed|run_id|.*(path|paths|file|files|dir)|rank|local_rank|is_main_process"
    r"|checkpoint_every|resume"
)
SETTINGS = re.compile(  # that the old dialect states outside a block
    r"\b(train_batch_tokens|train_seq_len|iterations|warmup_steps|max_wallclock_seconds|world_size"
    r"|grad_accum_steps|num_heads|num_kv_heads|attention_mode|tie_embeddings|\w+_lr|train_shards"
    r"|model_params):([\w.+-]+)"
)


class Point(NamedTuple):
    """A point of the training or of the validation curve."""

    step: int
    seconds: float | None
    loss: float  # nats per token
    bpb: float | None = None  # bits per byte, of validation


class Final(NamedTuple):
    """A score of the finished model."""

    label: str
    kind: str  # float, roundtrip, sliding, ttt or ngram
    loss: float  # nats per token
    bpb: float  # bits per byte
    seconds: float | None
    partial: bool  # of a part of the validation split


def seconds_in(rest: str) -> float | None:
    """Return the training time that a line of a step states: milliseconds, or minutes."""
    found = re.search(rf"\b(?:train_time|t):\s*{NUMBER}(ms|m)\b", rest)
    if found is None:
        return None
    return float(found[1]) / 1000 if found[2] == "ms" else 60 * float(found[1])


@dataclass(frozen=True)
class RunLog:
    """One log. Seconds are those of its clock; bytes those of its last line on the subject."""

    path: Path
    text: str  # without the source
    source: str  # of train_gpt.py, where the log begins with it

    @classmethod
    def read(cls, path: Path) -> "RunLog":
        """Read a log. Raises ConfigError when there is no such file or it is no text."""
        require(path.is_file(), f"{path}: no such log")
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
            text = re.sub(r"^\d{10}\.\d+ ", "", text, flags=re.M)  # the Unix time of a line
        except UnicodeDecodeError as error:
            require(False, f"{path}: not UTF-8 at byte {error.start}")

        parts = re.split(rf"^{RULE}$\n?", text, flags=re.M)
        sources = [i for i, part in enumerate(parts[:-1]) if re.search("^import ", part, re.M)]
        if not sources:
            return cls(path, text, "")
        # Runs of one RUN_ID append to one file, and the last made the artifact. What the run before
        # wrote ends where the docstring opens. Some runs state their settings before the source.
        last = sources[-1]
        before = "\n".join(parts[: last + 1])
        settings = last_match(r"^(Hyperparameters:\n(?:  .*\n)+)", before) or ""
        source = re.sub(r'\A(?:(?!""").*\n)+(?=""")', "", parts[last].removeprefix(settings))
        return cls(path, settings + "\n".join(parts[last + 1 :]), source)

    # ---- What ran

    @cached_property
    def json_events(self) -> dict[str, dict]:
        """The closing JSON lines of our own stages, by event; the last of each that is whole."""
        found = {}
        for line in re.findall(r'^\{"event": "\w+".*\}$', self.text, re.M):
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                found[event["event"]] = event
        return found

    @cached_property
    def knobs(self) -> dict[str, str]:
        """Every setting stated, as text: lines of `  key: value`, or words in one of two forms."""
        block = dict(re.findall(r"^  ([a-z]\w*): ?(.*)$", self.text, re.M))
        words = last_match(r"^--- Hyperparameters ---\n(.*)", self.text) or ""
        return block or dict(re.findall(r"(\w+)=(\S*)", words)) or dict(SETTINGS.findall(self.text))

    @property
    def configuration(self) -> dict[str, str]:
        """The knobs that have to be equal in all seeds of a record."""
        knobs = self.knobs.items()
        return {name: value for name, value in knobs if not NOT_CONFIGURATION.fullmatch(name)}

    @property
    def seed(self) -> int | None:
        stated = last_match(r"^(?:.* )?seed:(\d+)", self.text, int)
        return last_match(r"^(\d+)$", self.knobs.get("seed", ""), int) if stated is None else stated

    @property
    def versions(self) -> dict[str, str]:
        """python, torch, numpy and commit, as far as they are stated."""
        return dict(re.findall(r"(?:^| )(python|torch|numpy|commit):(\S+)", self.text, re.M))

    @property
    def code_hashes(self) -> set[str]:
        """SHA-256 of the code that our own stages ran: train_gpt.py, a NUL, eval_sliding.py."""
        return set(re.findall(r"^code_sha256:(\w+)$", self.text, re.M))

    @property
    def dataset(self) -> str:
        return last_match(r"^train_loader:dataset:(\S+)", self.text) or "unknown"

    @property
    def world_size(self) -> int | None:
        stated = re.search(r"\bworld_size[:=] ?(\d+)", self.text)
        return int(stated[1]) if stated else None

    @property
    def hardware(self) -> str:
        """As nvidia-smi lists it, or the CPU and its threads."""
        world = self.world_size or 1
        threads = last_match(r"^device:cpu threads:(\d+)", self.text)
        if threads:
            processes = "1 process" if world == 1 else f"{world} processes"
            return f"CPU, {processes} of {threads} thread{'' if threads == '1' else 's'}"
        gpu = last_match(r"^\| +\d+ +NVIDIA ([\w -]+?) +(?:On|Off) ", self.text)
        return f"{world}x{gpu}" if gpu else "unknown hardware"

    @property
    def params(self) -> int | None:
        return last_match(r"^model_params:(\d+)", self.text, int)

    @property
    def resumed(self) -> bool:
        """Whether training went on from a checkpoint, so that this is the log of its last part."""
        return re.search(r"^resumed:", self.text, re.M) is not None

    # ---- Curves

    @cached_property
    def _steps(self) -> list[tuple[int, float | None, str]]:
        """The lines of steps: step, seconds, and the rest of the line."""
        lines = STEP.findall(self.text)
        return [(int(step), seconds_in(rest), rest) for step, _, rest in lines]

    @cached_property
    def train(self) -> list[Point]:
        """The training curve, in order of the log."""
        rows = []
        for step, seconds, rest in self._steps:
            loss = last_match(rf"^(?:train_)?loss:\s*{NUMBER}", rest, float)
            if loss is not None:
                rows.append(Point(step, seconds, loss))
        return rows

    @cached_property
    def val(self) -> list[Point]:
        """The validation curve. Without a time of its own, that of the training line before."""
        rows, clock = [], 0.0
        for step, seconds, rest in self._steps:
            clock = clock if seconds is None else seconds
            found = re.search(rf"\bval_loss:\s*{NUMBER}.*val_bpb:\s*{NUMBER}", rest)
            if found:
                rows.append(Point(step, clock, float(found[1]), float(found[2])))
        if rows and rows[-1].step == self.steps and self.train_seconds is not None:
            rows[-1] = rows[-1]._replace(seconds=max(clock, self.train_seconds))
        return rows

    @property
    def recurs(self) -> bool:
        """Whether the depth recurrence came on during the training."""
        return "layer_loop:enabled " in self.text

    @property
    def steps(self) -> int | None:
        own = self.json_events.get("train_summary")
        if own:
            return own["steps"]
        return max((step for step, _, rest in self._steps if "loss:" in rest), default=None)

    @property
    def train_seconds(self) -> float | None:
        """Of training, with the collection of Hessians where our own log counts it."""
        own = self.json_events.get("train_summary")
        if own:
            return own["train_seconds"]
        stops = re.findall(r"stopping_early:(.*)", self.text)
        timed = [seconds for _, seconds, _ in self._steps] + [seconds_in(stop) for stop in stops]
        return max((seconds for seconds in timed if seconds is not None), default=None)

    # ---- Scores

    @cached_property
    def finals(self) -> list[Final]:
        """Scores of the finished model, in order of the log."""
        found = []
        for label, mode, loss, bpb, rest in FINAL.findall(self.text):
            kinds = [kind for kind, pattern in KINDS.items() if re.search(pattern, label)]
            milliseconds = last_match(r"(?:eval_)?time:(\d+)ms", rest, int)
            seconds = None if milliseconds is None else milliseconds / 1000
            if kinds:
                partial = mode == "PARTIAL"
                found.append(Final(label, kinds[0], float(loss), float(bpb), seconds, partial))
        return found

    def final(self, kind: str) -> Final | None:
        """Return the last score of a kind.

        A score may be printed twice: digits are of the last line, seconds of the last with a time.
        """
        rows = [row for row in self.finals if row.kind == kind]
        if not rows:
            return None
        timed = [row.seconds for row in rows if row.seconds is not None]
        return rows[-1]._replace(seconds=timed[-1] if timed else None)

    @property
    def score(self) -> Final | None:
        """The number of the submission: our last evaluation, or a stranger's best of the model."""
        own = self.json_events.get("eval_summary")
        if own is None:
            rows = [self.final(kind) for kind in ("ttt", "sliding", "roundtrip")]
            rows = [row for row in rows if row is not None and math.isfinite(row.bpb)]
            return min(rows, key=lambda row: (row.partial, row.bpb), default=None)
        kind = "sliding" if own.get("ttt", "off") == "off" else "ttt"
        exact = own.get("ngram") or own
        row = self.final(kind if exact is own else "ngram")
        if row is None:
            return None
        bpb = row.bpb if own["partial"] else exact["val_bpb"]
        return row._replace(loss=exact["val_loss"], bpb=bpb)

    @property
    def nats_per_bpb(self) -> float | None:
        """ln 2 times the bytes per token, of the score or, in a run that goes on, of validation."""
        row = self.score or (self.val[-1] if self.val else None)
        return row.loss / row.bpb if row and row.bpb else None

    @property
    def eval_seconds(self) -> float | None:
        """Of the evaluation that gave `score`: all of it where the log says so."""
        total = last_match(r"^total_eval_time:([\d.]+)s", self.text, float)
        return total if total is not None or self.score is None else self.score.seconds

    @property
    def evaluation(self) -> dict[str, str]:
        """How our own last evaluation was done: window, stride, world_size, ttt and its knobs."""
        # An audit may follow the evaluation, and prints the same lines.
        end = max(self.text.rfind('{"event": "eval_summary"'), 0)
        pattern = r"^(?:sliding evaluation of \S+|trained_window:\S+) (.*)$"
        lines = re.findall(pattern, self.text[:end], re.M)[-2:]
        return dict(re.findall(r"(\w+):(\S+)", " ".join(lines)))

    @property
    def targets(self) -> int | None:
        """Validation targets: scored, or in the split."""
        own = self.json_events.get("eval_summary")
        if own:
            return own["target_tokens"]
        pattern = r"^(?:val_loader:.* tokens|val_tokens|target_tokens):\s*(\d+)"
        return last_match(pattern, self.text, int)

    @property
    def scored_bytes(self) -> int | None:
        return self.json_events.get("eval_summary", {}).get("scored_bytes")

    @property
    def audit(self) -> str:
        """The table of the last audit, as the log has it; empty without one."""
        return last_match(r"((?:^\|.*\n)+)", self.text[self.text.rfind("| condition |") :]) or ""

    # ---- Bytes

    @property
    def bytes_code(self) -> int | None:
        pattern = r"^(?:Code size(?: \(compressed\))?: |artifact:.* code:)(\d+)"
        return last_match(pattern, self.text, int)

    @property
    def bytes_model(self) -> int | None:
        """Of the compressed model; the raw checkpoint of upstream logs does not count."""
        return last_match(r"^Serialized model \S+: (\d+) bytes", self.text, int)

    @property
    def bytes_total(self) -> int | None:
        """As the log's last total says, which is what reviewers go by; the sum without one."""
        pattern = r"^(?:Total submission size \S+: |budget:)(\d+)(?: bytes|/\d+ )"
        stated = last_match(pattern, self.text, int)
        if stated is None and self.bytes_code is not None and self.bytes_model is not None:
            return self.bytes_code + self.bytes_model
        return stated


def summary(run: RunLog) -> str:
    """Return the closing table of run_8xh100.sh. Raises ConfigError where a stage has not ended."""
    for event in ("train_summary", "eval_summary"):
        require(event in run.json_events, f"{run.path}: no {event}: the stage has not ended")
    train = run.json_events["train_summary"]
    slide = run.json_events["eval_summary"]
    exact = slide.get("ngram") or slide
    scores = [train["val_bpb_float"], train["val_bpb"], slide["val_bpb"], exact["val_bpb"]]
    scores = ["PARTIAL, see the log" if bpb is None else f"{bpb:.4f}" for bpb in scores]
    scored = f"stride {slide['stride']}, {slide['target_tokens']:,} targets"
    if slide.get("ttt", "off") != "off":
        scored += ", test-time training"
    if slide.get("ngram"):
        scored += f"; with a memory of n-grams {scores[3]}"
    total = f"{train['bytes_total']:,} of {MAX_SUBMISSION_BYTES:,} bytes"
    trained = f"{train['train_seconds']:.1f} s in {train['steps']:,} steps"
    return f"""
val_bpb before quantization   {scores[0]}
val_bpb of the artifact       {scores[1]}
val_bpb by sliding window     {scores[2]}  ({scored})
code + model                  {train["bytes_code"]:,} + {train["bytes_model"]:,} = {total}
training, evaluation          {trained}, {run.eval_seconds:.1f} s
log, artifact                 {run.path}, {train["artifact_path"]}"""


def one_line(run: RunLog) -> str:
    """Return what was understood of a log; None is what it does not state."""
    score = "no score" if run.score is None else f"{run.score.label} {run.score.bpb:.8f}"
    points = f"{len(run.train)} + {len(run.val)} points"
    trained = f"{points}, {run.steps} steps in {run.train_seconds} s"
    scored = f"{score} in {run.eval_seconds} s, {run.bytes_total} bytes"
    return f"{run.path}: seed {run.seed}, {trained}, {scored}"


def main() -> None:
    """Print what the logs on the command line say. Raises ConfigError."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("--summary", action="store_true", help="the closing table, of our own logs")
    args = parser.parse_args()
    for path in args.logs:
        run = RunLog.read(path)
        print(summary(run) if args.summary else one_line(run))


if __name__ == "__main__":
    run_entry_point(main)

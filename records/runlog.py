"""Read training logs of this trainer and of both upstream dialects into one form.

    python records/runlog.py logs/*.txt          # one line per log: what was understood of it
    python records/runlog.py --summary LOG       # the closing table of run_8xh100.sh

The upstream dialects are those of openai/parameter-golf: `step:N/M train_loss:F train_time:Nms` until April 2026, and
`N/M train_loss: F train_time: F.Fm tok/s: N` since (PR #1218). A log says which lines it has; nothing is guessed from
file names. What a log does not say is None or empty.
"""

import argparse
import contextlib
import itertools
import json
import re
import sys
from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import MAX_SUBMISSION_BYTES, require, run_entry_point

Train = namedtuple(
    "Train", "step seconds loss lr_scale"
)  # nats per token; fraction of the peak LR, or None
Val = namedtuple("Val", "step seconds loss bpb")
Event = namedtuple(
    "Event", "step name"
)  # the depth recurrence switched on, an SGDR restart, an early stop
Final = namedtuple(
    "Final", "label kind loss bpb seconds partial"
)  # kind: float, roundtrip, sliding or ttt
RULE = "=" * 100  # ends the source at the head of a log
NUMBER = r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|nan|inf)"
STAMP = r"^(?:\d+\.\d+ )?"  # some runs print the Unix time before every line
STEP = re.compile(STAMP + r"(?:step:)?(\d+)/(\d+) (.*)$", re.M)
LABEL, SCORES = (
    r"([A-Za-z][\w +/-]*?):?(?: stride:\d+)?",
    rf"(val|PARTIAL)_loss:\s*{NUMBER} +\w+_bpb:\s*{NUMBER}",
)
FINAL = re.compile(rf"{STAMP}{LABEL} {SCORES}(.*)$", re.M)
KINDS = {
    "float": r"pre-quantization|post_ema",
    "ttt": "ttt",
    "sliding": "sliding",
    "roundtrip": "roundtrip|quantized",
}
# Where a run happened to lie, which process it was, what its files are called and when it saved: no configuration.
NOT_CONFIGURATION = re.compile(
    r"seed|run_id|.*(path|paths|file|files|dir)|rank|local_rank|is_main_process|checkpoint_every|resume"
)
SETTINGS = re.compile(  # that the old dialect states outside a block
    r"\b(train_batch_tokens|train_seq_len|iterations|warmup_steps|max_wallclock_seconds|world_size|grad_accum_steps|"
    r"num_heads|num_kv_heads|attention_mode|tie_embeddings|\w+_lr|train_shards|model_params):([\w.+-]+)"
)


def number_in(pattern: str, text: str, kind: type = float, last: bool = True):
    """The first group of the last match of `pattern` (or the first), as `kind`; None without a match."""
    found = re.findall(pattern, text, re.M)
    return kind(found[-1 if last else 0]) if found else None


@dataclass(frozen=True)
class Run:
    """One log. Seconds are those of its clock; bytes those of its last line on the subject."""

    path: Path
    text: str  # without the source
    source: str  # of train_gpt.py, where the log begins with it

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Raises Refusal when there is no such file or it is no text."""
        require(path.is_file(), f"{path}: no such log")
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            require(False, f"{path}: not UTF-8 at byte {error.start}")
        parts = re.split(rf"^{RULE}$\n?", text, flags=re.M)
        sources = [i for i, part in enumerate(parts[:-1]) if re.search("^import ", part, re.M)]
        if not sources:
            return cls(path, text, "")
        # Two runs of one RUN_ID append to one file, and the last made the artifact; its source opens with a docstring.
        source = re.sub(r'\A(?:(?!""").*\n)+(?=""")', "", parts[sources[-1]])
        return cls(path, RULE.join(parts[sources[-1] + 1 :]), source)

    @cached_property
    def json_events(self) -> dict[str, dict]:
        """The closing JSON lines of our own stages, by event; of several the last, and none that was cut off."""
        found = {}
        for line in re.findall(r'^\{"event": "\w+".*\}$', self.text, re.M):
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                found[event["event"]] = event
        return found

    @property
    def dialect(self) -> str:
        """ours, old, new or unknown."""
        if "train_summary" in self.json_events or "overrides: " in self.text:
            return "ours"
        loss = re.search(STAMP + r"(step:)?\d+/\d+ train_loss:( ?)", self.text, re.M)
        return "unknown" if loss is None else "old" if loss[1] else "new"

    @cached_property
    def knobs(self) -> dict[str, str]:
        """Every setting that the log states, as text: the block of `  key: value` lines, or `key:value` words."""
        block = dict(re.findall(STAMP + r"  ([a-z]\w*): ?(.*)$", self.text, re.M))
        return block or dict(SETTINGS.findall(self.text))

    @property
    def configuration(self) -> dict[str, str]:
        """The knobs that have to be equal in all seeds of a record."""
        return {
            name: value
            for name, value in self.knobs.items()
            if not NOT_CONFIGURATION.fullmatch(name)
        }

    @property
    def seed(self) -> int | None:
        stated = number_in(r"^(?:.* )?seed:(\d+)", self.text, int)
        return (
            stated if stated is not None else number_in(r"^(\d+)$", self.knobs.get("seed", ""), int)
        )

    @property
    def versions(self) -> dict[str, str]:
        """python, torch, numpy and commit, as far as they are stated."""
        upstream = re.findall(r"^Running (Python|PyTorch) (\S+)", self.text, re.M)
        found = {
            {"Python": "python", "PyTorch": "torch"}[name]: version for name, version in upstream
        }
        return found | dict(
            re.findall(r"(?:^| )(python|torch|numpy|commit):(\S+)", self.text, re.M)
        )

    @property
    def code_hashes(self) -> set[str]:
        """SHA-256 of the code that our own stages ran: train_gpt.py, a NUL, eval_sliding.py."""
        return set(re.findall(r"^code_sha256:(\w+)$", self.text, re.M))

    @property
    def hardware(self) -> str:
        """As nvidia-smi lists it, or the CPU and its threads."""
        world, cpu = self.world_size or 1, re.search(r"^device:cpu threads:(\d+)", self.text, re.M)
        if cpu:
            return f"CPU, {world} process{'es' * (world > 1)} of {cpu[1]} thread{'s' * (cpu[1] != '1')}"
        gpus = re.findall(r"^\| +\d+ +(NVIDIA [\w -]+?) +(?:On|Off) ", self.text, re.M)
        return f"{world}x{gpus[0].removeprefix('NVIDIA ')}" if gpus else "unknown hardware"

    @property
    def world_size(self) -> int | None:
        stated = number_in(r"\bworld_size:(\d+)", self.text, int, last=False)
        return stated or (int(self.knobs["world_size"]) if "world_size" in self.knobs else None)

    @property
    def params(self) -> int | None:
        return number_in(STAMP + r"model_params:(\d+)", self.text, int)

    @cached_property
    def _steps(self) -> list[tuple[int, int, str]]:
        return [(int(step), int(total), rest) for step, total, rest in STEP.findall(self.text)]

    @cached_property
    def train(self) -> list[Train]:
        """The training curve, in order of the log."""
        rows = []
        for step, _, rest in self._steps:
            loss, scale = (
                number_in(rf"train_loss:\s*{NUMBER}", rest),
                number_in(r"lr_scale:(\S+)", rest),
            )
            if loss is not None:
                rows.append(Train(step, self._seconds(rest), loss, scale))
        return rows

    @cached_property
    def val(self) -> list[Val]:
        """The validation curve. The new dialect does not time it: its time is that of the training line before, and of
        the end at the last step."""
        rows, clock = [], 0.0
        for step, _, rest in self._steps:
            seconds = self._seconds(rest)
            clock = clock if seconds is None else seconds
            loss, bpb = (
                number_in(rf"val_loss:\s*{NUMBER}", rest),
                number_in(rf"val_bpb:\s*{NUMBER}", rest),
            )
            if loss is not None and bpb is not None:
                rows.append(Val(step, clock, loss, bpb))
        if rows and rows[-1].step == self.steps and self.train_seconds is not None:
            rows[-1] = rows[-1]._replace(seconds=max(clock, self.train_seconds))
        return rows

    @staticmethod
    def _seconds(rest: str) -> float | None:
        milliseconds = number_in(rf"train_time:\s*{NUMBER}ms", rest)
        minutes = number_in(rf"train_time:\s*{NUMBER}m\b", rest)
        return (
            milliseconds / 1000
            if milliseconds is not None
            else minutes * 60
            if minutes is not None
            else None
        )

    @property
    def events(self) -> list[Event]:
        """What happened at a step: recurrence, restarts of the learning rate, the stop by the clock."""
        found = [
            Event(int(step), "recurrence on")
            for step in re.findall(r"layer_loop:enabled step:(\d+)", self.text)
        ]
        scales = [(row.step, row.lr_scale) for row in self.train if row.lr_scale is not None]
        pairs = itertools.pairwise(scales)
        found += [
            Event(step, "LR restart")
            for (_, before), (step, after) in pairs
            if after > 1.2 * before
        ]
        stops = re.findall(r"stopping_early: \w+ train_time:\s*\d+ms step:\s*(\d+)", self.text)
        return sorted(found + [Event(int(step), "clock") for step in stops])

    @property
    def resumed(self) -> bool:
        """Whether a training of our own went on from a checkpoint, so that this is the log of its last part."""
        return re.search(r"^resumed:", self.text, re.M) is not None

    @property
    def steps(self) -> int | None:
        own = self.json_events.get("train_summary")
        return (
            own["steps"]
            if own
            else max((step for step, _, rest in self._steps if "_loss" in rest), default=None)
        )

    @property
    def train_seconds(self) -> float | None:
        """Of training, with the collection of Hessians where our own log counts it."""
        own = self.json_events.get("train_summary")
        if own:
            return own["train_seconds"]
        stopped = number_in(r"stopping_early:.* train_time:\s*(\d+)ms", self.text)
        timed = [
            seconds for _, _, rest in self._steps if (seconds := self._seconds(rest)) is not None
        ]
        return stopped / 1000 if stopped is not None else max(timed, default=None)

    @cached_property
    def finals(self) -> list[Final]:
        """Scores of the finished model in order, those with most digits where a line is repeated as `_exact`."""
        found = []
        for label, mode, loss, bpb, rest in FINAL.findall(self.text):
            kind = next(
                (kind for kind, pattern in KINDS.items() if re.search(pattern, label)), None
            )
            milliseconds = number_in(r"(?:eval_)?time:(\d+)ms", rest)
            seconds = milliseconds / 1000 if milliseconds is not None else None
            if kind:
                found.append(
                    Final(label, kind, float(loss), float(bpb), seconds, mode == "PARTIAL")
                )
        return found

    def final(self, *kinds: str) -> Final | None:
        """The last score of the first of these kinds that has one, with the digits of its exact line."""
        for kind in kinds:
            rows = [row for row in self.finals if row.kind == kind]
            if rows:
                timed = [row.seconds for row in rows if row.seconds is not None]
                return rows[-1]._replace(seconds=timed[-1] if timed else None)
        return None

    @property
    def score(self) -> Final | None:
        """The number of the submission: our last evaluation; of a stranger's the last of the kind that comes latest."""
        own = self.json_events.get("eval_summary")
        if own is None:
            return self.final("ttt", "sliding", "roundtrip")
        row = self.final("sliding" if own.get("ttt", "off") == "off" else "ttt")
        return row and row._replace(
            loss=own["val_loss"], bpb=row.bpb if own["partial"] else own["val_bpb"]
        )

    @property
    def eval_seconds(self) -> float | None:
        """Of the evaluation that gave `score`: all of it where the log says so."""
        total = number_in(r"^(?:\d+\.\d+ )?total_eval_time:([\d.]+)s", self.text)
        return total if total is not None or self.score is None else self.score.seconds

    @property
    def evaluation(self) -> dict[str, str]:
        """How the last evaluation of our own was done: window, stride, world_size, ttt and its settings; else empty."""
        scored = self.text[
            : max(self.text.rfind('{"event": "eval_summary"'), 0)
        ]  # an audit may follow
        lines = re.findall(
            r"^(?:sliding evaluation of \S+|trained_window:\S+) (.*)$", scored, re.M
        )[-2:]
        return dict(re.findall(r"(\w+):(\S+)", " ".join(lines)))

    @property
    def bytes_code(self) -> int | None:
        return number_in(STAMP + r"Code size(?: \(compressed\))?: (\d+) bytes", self.text, int)

    @property
    def bytes_model(self) -> int | None:
        """Of the compressed model; the raw checkpoint of upstream logs does not count."""
        return number_in(STAMP + r"Serialized model \S+: (\d+) bytes", self.text, int)

    @property
    def bytes_total(self) -> int | None:
        """As the log's last total says, which is what reviewers go by; of the raw checkpoint never."""
        stated = number_in(STAMP + r"Total submission size \S+: (\d+) bytes", self.text, int)
        known = self.bytes_code is not None and self.bytes_model is not None
        return stated if stated is not None or not known else self.bytes_code + self.bytes_model

    @property
    def targets(self) -> int | None:
        """Validation targets: scored, or in the split."""
        own = self.json_events.get("eval_summary")
        stated = number_in(
            STAMP + r"(?:val_loader:.* tokens|val_tokens|target_tokens):\s*(\d+)", self.text, int
        )
        return own["target_tokens"] if own else stated

    @property
    def scored_bytes(self) -> int | None:
        own = self.json_events.get("eval_summary")
        return own["scored_bytes"] if own else None

    @property
    def nats_per_bpb(self) -> float | None:
        """ln 2 times the bytes per token: what turns bits per byte into nats per token."""
        return self.score.loss / self.score.bpb if self.score and self.score.bpb else None

    @property
    def budget(self) -> dict[str, int]:
        """Bytes of the artifact by role, from the last of our own tables."""
        tables = re.findall(r"^role +weights .*\n((?:.*\n)*?)total .*", self.text, re.M)
        lines = tables[-1].splitlines() if tables else []
        rows = (
            re.fullmatch(r"(\w+) +(?:[\d,]+ +)??([\d,]+)(?: +[\d.]+ +[\d,]+)?", line)
            for line in lines
        )
        return {row[1]: int(row[2].replace(",", "")) for row in rows if row}

    @property
    def audit(self) -> list[str]:
        """The rows of the last audit, as the log has them."""
        tables = re.findall(r"^\| condition \| test .*\n\|[-|]+\|\n((?:\|.*\n?)*)", self.text, re.M)
        return tables[-1].splitlines() if tables else []

    @property
    def tokens_per_step(self) -> int | None:
        return int(self.knobs["train_batch_tokens"]) if "train_batch_tokens" in self.knobs else None


def summary(run: Run) -> str:
    """The closing table of run_8xh100.sh. Raises Refusal when a stage has not ended."""
    for event in ("train_summary", "eval_summary"):
        require(event in run.json_events, f"{run.path}: no {event}: the stage has not ended")
    train, slide = (run.json_events[event] for event in ("train_summary", "eval_summary"))

    def show(value: float | None) -> str:
        return "PARTIAL, see the log" if value is None else f"{value:.4f}"

    scored = f"stride {slide['stride']}, {slide['target_tokens']:,} targets"
    scored += "" if slide.get("ttt", "off") == "off" else ", test-time training"
    code, model, total = (train[f"bytes_{what}"] for what in ("code", "model", "total"))
    spent = slide["eval_seconds"]
    return f"""
val_bpb before quantization   {show(train["val_bpb_float"])}
val_bpb of the artifact       {show(train["val_bpb"])}
val_bpb by sliding window     {show(slide["val_bpb"])}  ({scored})
code + model                  {code:,} + {model:,} = {total:,} of {MAX_SUBMISSION_BYTES:,} bytes
training, evaluation          {train["train_seconds"]:.1f} s in {train["steps"]:,} steps, {spent:.1f} s
log, artifact                 {run.path}, {train["artifact_path"]}"""


def one_line(run: Run) -> str:
    """What was understood of a log."""
    score = "no score" if run.score is None else f"{run.score.label} {run.score.bpb:.8f}"
    seconds = [
        f"{s:.0f} s" if s is not None else "? s" for s in (run.train_seconds, run.eval_seconds)
    ]
    points = f"{len(run.train)} + {len(run.val)} points, {run.steps} steps in {seconds[0]}"
    return f"{run.path}: {run.dialect}, seed {run.seed}, {points}, {score} in {seconds[1]}, {run.bytes_total} bytes"


def main() -> None:
    """Print what the logs on the command line say. Raises Refusal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument(
        "--summary", action="store_true", help="the closing table of run_8xh100.sh, of our own logs"
    )
    args = parser.parse_args()
    for path in args.logs:
        run = Run.read(path)
        print(summary(run) if args.summary else one_line(run))


if __name__ == "__main__":
    run_entry_point(main)

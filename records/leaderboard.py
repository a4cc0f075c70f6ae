"""The public leaderboard of openai/parameter-golf as leaderboard.csv has it: who reached how many bits per byte."""

import csv
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from runlog import Run

from train_gpt import Refusal, require

CSV = Path(__file__).with_name("leaderboard.csv")
CHALLENGE_TARGETS = (
    40_000_000  # and more, with every tokenizer in use, has the challenge's validation split
)
RECORD_NATS = 0.005  # per token, by which a record has to beat the one before


class Row(NamedTuple):
    """An accepted or pending record. Scores are means over the seeds on the challenge's validation split."""

    pr: str  # digits, or "baseline"
    date: str  # ISO
    name: str
    author: str  # "" where unknown
    val_bpb: float  # bits per byte
    val_loss: float | None  # nats per token; tokenizers differ, so it compares nothing between rows
    seeds: list[float]  # bits per byte of each seed; [] where unknown


@cache
def read_rows() -> list[Row]:
    """All rows in the order of the file, best first. Raises OSError without the file, ValueError for a damaged one."""
    with open(CSV, encoding="utf-8", newline="") as file:
        return [
            Row(
                **row
                | {
                    "val_bpb": float(row["val_bpb"]),
                    "val_loss": float(row["val_loss"]) if row["val_loss"] else None,
                    "seeds": [float(score) for score in row["seeds"].split()],
                }
            )
            for row in csv.DictReader(file)
        ]


def find_row(name: str) -> Row:
    """The row of a PR ("1394" or "#1394"), of the naive "baseline", or the "best" (lowest bits per byte). Raises
    Refusal for any other name, listing those there are."""
    rows = {row.pr: row for row in read_rows()}
    if name == "best":
        return min(rows.values(), key=lambda row: row.val_bpb)
    key = name.removeprefix("#")
    require(
        key in rows,
        f"{name}: no such row of the leaderboard, choose best or one of {' '.join(rows)}",
    )
    return rows[key]


class Comparison(NamedTuple):
    """A record against a baseline; negative is better."""

    bpb: float
    nats: float  # per token of the record's tokenizer
    verdict: str  # both bars, in both units, with p
    reached: bool | None  # the bar of a record; None where there are too few seeds for the test


class Baseline(NamedTuple):
    """What a record is compared with: a row of the leaderboard, or runs."""

    name: str
    val_bpb: float
    val_loss: float | None
    seeds: list[float]
    scored: tuple[
        int | None, int | None
    ]  # validation targets and bytes of its runs; (None, None) for a row

    def same_text(self, run: Run) -> bool | None:
        """Whether `run` was validated on the same text, for a row that of the challenge; None if unknown."""
        if run.targets is None:
            return None
        is_row, scored = self.scored == (None, None), (run.targets, run.scored_bytes)
        return run.targets >= CHALLENGE_TARGETS if is_row else self.scored == scored

    def compare(self, scores: list[float], nats_per_bpb: float) -> Comparison:
        """Welch's one-sided test that `scores` are better at all, and better by the challenge's bar. Raises Refusal."""
        bpb, bar = statistics.fmean(scores) - self.val_bpb, RECORD_NATS / nats_per_bpb
        nats = bpb * nats_per_bpb
        better = f"It is {'better' if bpb < 0 else 'worse'} by {abs(bpb):.5f} bits per byte, "
        better += f"{abs(nats):.5f} nats per token"
        bars = f"The bar of a record is {RECORD_NATS} nats per token, here {bar:.5f} bits per byte, at p < 0.01"
        if min(len(scores), len(self.seeds)) < 2 or not any(
            map(statistics.stdev, (scores, self.seeds))
        ):
            return Comparison(
                bpb, nats, f"{bars}. No test: it takes two seeds of each. {better}.", None
            )
        try:
            from scipy.stats import ttest_ind
        except ImportError:
            raise Refusal("the Welch test needs scipy: pip install scipy") from None
        tests = (scores, self.seeds), (scores, [score - bar for score in self.seeds])
        p, p_bar = (ttest_ind(*both, equal_var=False, alternative="less").pvalue for both in tests)
        reached = bool(bpb <= -bar and p_bar < 0.01)
        welch = f"Welch, one-sided: p = {p:.2g} that it is no better, p = {p_bar:.2g} that it is not better by the bar"
        return Comparison(
            bpb, nats, f"{bars}: {'' if reached else 'not '}reached. {better}; {welch}.", reached
        )


def find_baseline(names: list[str]) -> Baseline:
    """A row by its name, or the runs of some logs or of a records folder. Raises Refusal."""
    paths = [Path(name) for name in names]
    if len(names) == 1 and not paths[0].exists():
        row = find_row(names[0])
        title = (
            f"{row.name}, PR #{row.pr}" if row.pr.isdigit() and row.pr not in row.name else row.name
        )
        return Baseline(title, row.val_bpb, row.val_loss, row.seeds, (None, None))
    logs = [log for path in paths for log in (logs_in(path) if path.is_dir() else [path])]
    runs = [run for run in map(Run.read, logs) if run.score and not run.score.partial]
    require(runs, f"{' '.join(names)}: no log with a score of the whole split")
    scored = {(run.targets, run.scored_bytes) for run in runs}
    require(len(scored) == 1, f"{' '.join(names)}: logs of different validation texts")
    title = paths[0].name if paths[0].is_dir() else ", ".join(path.stem for path in paths)
    scores, losses = ([getattr(run.score, what) for run in runs] for what in ("bpb", "loss"))
    return Baseline(title, statistics.fmean(scores), statistics.fmean(losses), scores, scored.pop())


def logs_in(folder: Path) -> list[Path]:
    """The logs of a records folder, by the names that accepted records give them."""
    candidates = [
        *folder.glob("*.log"),
        *folder.glob("*.txt"),
        *folder.glob("logs/*.txt"),
        *folder.glob("logs/*.log"),
    ]
    return sorted(path for path in candidates if not path.name.startswith("requirements"))

"""The public leaderboard of openai/parameter-golf, and the test by which a record beats a row."""

import csv
import statistics
from pathlib import Path
from typing import NamedTuple

from common import optional
from runlog import RunLog

from train_gpt import require

CSV = Path(__file__).with_name("leaderboard.csv")
CHALLENGE_TARGETS = 40_000_000  # the challenge's validation split has more, by every tokenizer
SPLITS = {  # targets and bytes of that split, as merged logs state or imply them; both less a tail
    "sp1024": (62_021_632, 151_080_360),
    "sp4096": (45_508_608, 151_074_053),
    "sp8192": (40_540_160, 151_078_222),
    "sp8192 with CaseOps": (47_851_520, 151_084_309),
}
RECORD_NATS = 0.005  # per token, by which a record has to beat the one before, at p < 0.01


def on_challenge(run: RunLog) -> bool | None:
    """Say whether a run was validated on the challenge's split; None where its log does not."""
    return None if run.targets is None else run.targets >= CHALLENGE_TARGETS


def split_bytes(targets: int) -> tuple[str, float] | None:
    """Return tokenizer and bytes of so many targets of the challenge's split; None if unknown.

    The tail that is no whole window is left out, so counts differ by a fraction of a per mille.
    """
    for tokenizer, (all_targets, all_bytes) in SPLITS.items():
        if abs(targets / all_targets - 1) < 1e-3:
            return tokenizer, all_bytes * targets / all_targets
    return None


class Baseline(NamedTuple):
    """What a record is compared with: a row of the leaderboard, or runs. Scores are their means."""

    name: str
    val_bpb: float  # bits per byte
    seeds: list[float]  # bits per byte of each seed; [] where unknown
    scored: tuple[int, int] | None = None  # validation targets and bytes of runs; None for a row

    def same_text(self, run: RunLog) -> bool | None:
        """Say whether a run was validated on the text of this baseline; None if unknown."""
        if self.scored is None or run.targets is None:
            return on_challenge(run)
        return self.scored == (run.targets, run.scored_bytes)

    def compare(self, scores: list[float], nats_per_bpb: float) -> tuple[str, bool | None]:
        """Test by Welch, one-sided, that scores are better at all, and by a record's bar.

        Returns the difference and both bars in both units, in words; and whether a record's bar is
        reached, None for too few seeds for the test. Raises ConfigError without scipy.
        """
        bar = RECORD_NATS / nats_per_bpb
        bpb = statistics.fmean(scores) - self.val_bpb
        better = f"It is {'better' if bpb < 0 else 'worse'} by {abs(bpb):.5f} bits per byte, "
        better += f"{abs(bpb * nats_per_bpb):.5f} nats per token"
        bars = f"The bar of a record is {RECORD_NATS} nats per token, here {bar:.5f} bits per byte"
        bars += ", at p < 0.01"
        groups = (scores, self.seeds)
        if min(map(len, groups)) < 2 or not any(map(statistics.stdev, groups)):
            return f"{bars}. No test: it takes two seeds of each. {better}.", None

        ttest_ind = optional("scipy.stats").ttest_ind
        below_bar = [score - bar for score in self.seeds]
        p = ttest_ind(scores, self.seeds, equal_var=False, alternative="less").pvalue
        p_bar = ttest_ind(scores, below_bar, equal_var=False, alternative="less").pvalue
        reached = bool(bpb <= -bar and p_bar < 0.01)
        welch = f"Welch, one-sided: p = {p:.2g} that it is no better, "
        welch += f"p = {p_bar:.2g} that it is not better by the bar"
        return f"{bars}: {'' if reached else 'not '}reached. {better}; {welch}.", reached


def read_rows() -> dict[str, Baseline]:
    """Return the rows of the leaderboard by PR, in the order of the file, best first."""
    rows = {}
    with open(CSV, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            seeds = [float(score) for score in row["seeds"].split()]
            name = f"{row['pr']} ({row['name']})"
            rows[row["pr"]] = Baseline(name, float(row["val_bpb"]), seeds)
    return rows


def find_row(name: str) -> Baseline:
    """Return the row of a PR ("1394" or "#1394"), of the naive "baseline", or the "best".

    Raises ConfigError for any other name, listing those there are.
    """
    rows = read_rows()
    key = next(iter(rows)) if name == "best" else name.removeprefix("#")
    require(key in rows, f"{name}: no such row of the leaderboard: best or {' '.join(rows)}")
    return rows[key]


def logs_in(folder: Path) -> list[Path]:
    """Return the logs of a records folder, by the names that accepted records give them."""
    found = [*folder.glob("*"), *folder.glob("logs/*")]
    logs = [path for path in found if path.suffix in (".log", ".txt")]
    return sorted(path for path in logs if not path.name.startswith("requirements"))


def find_baseline(name: str) -> Baseline:
    """Return a row by its name, or the runs of a log or of a records folder. Raises ConfigError."""
    path = Path(name)
    if not path.exists():
        return find_row(name)
    runs = [RunLog.read(log) for log in (logs_in(path) if path.is_dir() else [path])]
    runs = [run for run in runs if run.score and not run.score.partial]
    require(runs, f"{name}: no log with a score of the whole split")
    scored = {(run.targets, run.scored_bytes) for run in runs}
    require(len(scored) == 1, f"{name}: logs of different validation texts")
    scores = [run.score.bpb for run in runs]
    return Baseline(path.stem, statistics.fmean(scores), scores, scored.pop())

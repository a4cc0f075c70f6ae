"""Training logs as one picture: curves and final scores.

    python records/plot.py logs/RUN_ID.txt                                # logs/RUN_ID.png
    python records/plot.py logs/*_seed*.txt --out seeds.png --title "Three seeds"
    python records/plot.py a.txt b.log --out both.png --x seconds

Reads the logs of this trainer and of both upstream dialects. The y axis shows the last two thirds
of every curve, all of a curve of few points, and every final score.
"""

import io
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

from common import ArgumentParser, optional
from runlog import Final, RunLog

from train_gpt import require, run_entry_point, write_atomically

# Okabe-Ito without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--")  # of the first seven runs, and of the next
AXES = {"steps": "steps", "seconds": "seconds of training"}
KINDS = {  # of scores: name and marker
    "float": ("float", "D"),
    "roundtrip": ("quantized", "s"),
    "sliding": ("sliding", "v"),
    "ttt": ("TTT", "*"),
    "ngram": ("n-grams", "P"),
}
FEW = 3  # points of a curve; with fewer in its last two thirds, all of it is shown
DPI = 150
FONT = 9  # points


@dataclass(frozen=True)
class Curve:
    """How one run is drawn."""

    run: RunLog
    name: str
    colour: str
    style: str
    nats: float  # per token, that are 1 on the y axis: a bit per byte, or 1 where none is known

    def end(self, x: str) -> float:
        """Return where the run ends on the x axis; NaN where the log does not say."""
        if x == "steps":
            return self.run.steps
        return math.nan if self.run.train_seconds is None else self.run.train_seconds

    def points(self, x: str, rows: list) -> tuple[list[float], list[float]]:
        """Return x and y of rows of RunLog.train or RunLog.val; NaN is not drawn."""
        seconds = [math.nan if row.seconds is None else row.seconds for row in rows]
        xs = [row.step for row in rows] if x == "steps" else seconds
        return xs, [row.loss / self.nats for row in rows]

    def finals(self) -> list[Final]:
        """Return the last score of each kind."""
        return [row for row in map(self.run.final, KINDS) if row is not None]

    def score(self, row: Final) -> float:
        """Return a final score in the unit of the y axis."""
        return row.loss if self.nats == 1 else row.bpb

    def label(self) -> str:
        """Return name, final scores and bytes; the score of a part of the split is PARTIAL."""
        scores = []
        for row in self.finals():
            partial = "PARTIAL " if row.partial else ""
            scores.append(f"{partial}{KINDS[row.kind][0]} {self.score(row):.4f}")
        total = self.run.bytes_total
        size = [] if total is None else [f"{total:,} bytes"]
        return "   ".join([self.name, *scores, *size])

    def shown(self) -> list[float]:
        """Return the values that the y axis has to hold: scores, and two thirds of the curve."""
        points = [(row.step, row.loss / self.nats) for row in self.run.train + self.run.val]
        points = [(step, y) for step, y in points if math.isfinite(y)]
        late = [y for step, y in points if step >= self.run.steps / 3]
        curve = late if len(late) >= FEW else [y for _, y in points]
        return curve + [y for y in map(self.score, self.finals()) if math.isfinite(y)]


def names_of(runs: list[RunLog]) -> list[str]:
    """Return file names without suffix, after the folder's where the logs lie in several."""
    paths = [run.path.resolve().with_suffix("") for run in runs]
    parts = 2 if len({path.parent for path in paths}) > 1 else 1
    names = ["/".join(path.parts[-parts:]) for path in paths]
    short = [name if len(name) <= 60 else f"...{name[-57:]}" for name in names]
    # Matplotlib takes what stands between dollars for a formula.
    return [name.replace("$", r"\$") for name in short]


def curves_of(runs: list[RunLog]) -> list[Curve]:
    """Choose name, colour and unit: bits per byte where all runs state what one is.

    Raises ConfigError for a log without a curve, or too many.
    """
    looks = [(colour, style) for style in STYLES for colour in COLOURS]
    require(0 < len(runs) <= len(looks), f"{len(runs)} logs: expected 1 to {len(looks)}")
    for run in runs:
        require(run.train or run.val, f"{run.path}: no training or validation curve in this log")
    ratios = [run.nats_per_bpb for run in runs]
    if not all(ratios):
        ratios = [1.0] * len(runs)
    named = zip(runs, names_of(runs), looks, ratios, strict=False)
    return [Curve(run, name, *look, ratio) for run, name, look, ratio in named]


def y_range(curves: list[Curve]) -> tuple[float, float]:
    """Span the final scores and the last two thirds of every curve. Raises ConfigError."""
    shown = [y for curve in curves for y in curve.shown()]
    require(shown, f"{curves[0].run.path}: no finite loss in this log")
    margin = 0.04 * (max(shown) - min(shown)) or 0.1
    return min(shown) - margin, max(shown) + margin


def draw_curve(axes, x: str, curve: Curve) -> None:
    """Draw the training points, validation and final scores."""
    look = {"color": curve.colour, "linestyle": curve.style}
    thin = {"marker": ".", "linewidth": 1, "alpha": 0.7}
    axes.plot(*curve.points(x, curve.run.train), **look, **thin, label="training")
    # A line from the untrained model would dive through all.
    trained = [row for row in curve.run.val if row.step > 0]
    if trained:
        axes.plot(*curve.points(x, trained), **look, marker="o", label="validation")

    # Scores of one step stand side by side, not on each other.
    offset_copy = optional("matplotlib.transforms").offset_copy
    for place, row in enumerate(curve.finals()):
        name, marker = KINDS[row.kind]
        plain = {"linestyle": "", "color": curve.colour, "markerfacecolor": "none", "zorder": 4}
        plain["transform"] = offset_copy(axes.transData, axes.figure, x=8 * place, units="points")
        axes.plot([curve.end(x)], [curve.score(row)], marker=marker, label=name, **plain)


def figure_of(runs: list[RunLog], x="steps", title=""):
    """Return the matplotlib Figure. Raises ConfigError."""
    curves = curves_of(runs)
    figure_class = optional("matplotlib.figure").Figure
    line = optional("matplotlib.lines").Line2D
    figure = figure_class(figsize=(10, 5.8 + 0.17 * len(curves)), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        require(not math.isnan(curve.end(x)), f"--x {x}: {curve.run.path} does not state it")
        draw_curve(axes, x, curve)
    axes.set_xlabel(AXES[x])
    axes.set_xlim(0, 1.1 * max(curve.end(x) for curve in curves) or 1)
    axes.set_ylabel("nats per token" if curves[0].nats == 1 else "bits per byte")
    axes.set_ylim(*y_range(curves))
    axes.grid(alpha=0.25)

    # One legend says which run has which colour and score, another what the marks mean.
    named = [line([], [], color=curve.colour, linestyle=curve.style) for curve in curves]
    labels = [curve.label() for curve in curves]
    hardware = " and ".join(dict.fromkeys(run.hardware for run in runs))
    title = title.replace("$", r"\$") or "Training curves"
    heading = f"{title}: {len(runs)} run{'' if len(runs) == 1 else 's'} on {hardware}"
    plain = {"frameon": False, "fontsize": FONT}
    top = {"title": textwrap.fill(heading, 110), "title_fontsize": FONT + 2}
    figure.legend(named, labels, loc="outside upper left", alignment="left", **top, **plain)
    handles, meanings = axes.get_legend_handles_labels()
    marks = dict(zip(meanings, handles, strict=True))
    legend = figure.legend(marks.values(), marks, loc="outside lower left", ncols=7, **plain)
    for handle in legend.legend_handles:
        handle.set(color="0.3", alpha=1)
    return figure


def draw(runs: list[RunLog], path: Path, x="steps", title="") -> None:
    """Write the picture of the runs to `path`, a PNG. Raises ConfigError."""
    png = io.BytesIO()
    figure_of(runs, x, title).savefig(png, format="png", dpi=DPI)
    write_atomically(path, png.getvalue())


def main() -> None:
    """Draw the logs of the command line. Raises ConfigError; exits with 0 after --help."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG")
    add("--out", type=Path, metavar="PNG", help="default for one log: its name with suffix .png")
    add("--x", choices=list(AXES), default="steps", help="default: steps")
    add("--title", default="", metavar="T")
    args = parser.parse_args()
    require(args.out or len(args.logs) == 1, f"{len(args.logs)} logs: --out PNG is required")
    out = args.out or args.logs[0].with_suffix(".png")
    fresh = out.suffix == ".png" and out not in args.logs
    require(fresh, f"--out {out}: expected a .png that is none of the logs")
    draw([RunLog.read(path) for path in args.logs], out, args.x, args.title)
    print(out)


if __name__ == "__main__":
    run_entry_point(main)

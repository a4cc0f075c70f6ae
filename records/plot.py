"""Training logs as one picture: curves, learning rate, events, scores, rows of the leaderboard.

    python records/plot.py logs/RUN_ID.txt                                # logs/RUN_ID.png
    python records/plot.py logs/seed_*.txt --out seeds.png --title "Three seeds"
    python records/plot.py a.txt b.log --out both.png --x seconds --rows baseline 1394 best

Reads the logs of this trainer and of both upstream dialects. Rows of the leaderboard (PR numbers,
baseline, best) are drawn unasked, baseline and best, where the runs were validated on the
challenge's split; --rows alone draws none.
"""

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import ArgumentParser, figure_png, optional
from leaderboard import CHALLENGE_TARGETS, Baseline, find_row
from runlog import Final, RunLog

from train_gpt import require, run_entry_point, write_atomically

# Okabe-Ito without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--")  # of the first seven runs, and of the next
PANELS = {"steps": "steps", "seconds": "seconds of training", "tokens": "million training tokens"}
KINDS = {  # of scores: name and marker
    "float": ("float", "D"),
    "roundtrip": ("quantized", "s"),
    "sliding": ("sliding", "v"),
    "ttt": ("TTT", "*"),
}
EVENTS = {"recurrence on": "--", "LR restart": ":", "clock": "-."}
MEDIAN_POINTS = 15  # window of the running median
MEDIAN_FROM = 60  # training points it takes to draw one
SETTLED = 0.1  # fraction of the steps after which the loss has to be in the picture
HEADROOM = 1.6  # of the worst final loss: what is higher is cut off
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

    def x(self, panel: str, step: int, seconds: float | None) -> float:
        """Return where a point lies on the x axis of a panel; NaN, not drawn, where unknown."""
        if panel == "steps":
            return step
        if panel == "seconds":
            return math.nan if seconds is None else seconds
        tokens = self.run.tokens_per_step
        return math.nan if tokens is None else step * tokens / 1e6

    def end(self, panel: str) -> float:
        """Return where the run ends on the x axis of a panel."""
        return self.x(panel, self.run.steps, self.run.train_seconds)

    def points(self, panel: str, rows: list) -> tuple[list[float], list[float]]:
        """Return x and y of rows of RunLog.train or RunLog.val."""
        xs = [self.x(panel, row.step, row.seconds) for row in rows]
        return xs, [row.loss / self.nats for row in rows]

    def finals(self) -> list[Final]:
        """Return the last score of each kind."""
        return [row for row in map(self.run.final, KINDS) if row is not None]

    def score(self, row: Final) -> float:
        """Return a final score in the unit of the y axis."""
        return row.loss if self.nats == 1 else row.bpb

    def label(self) -> str:
        """Return name, final scores and bytes. A part of the split is PARTIAL and no val_bpb."""
        text = self.name
        for partial in (False, True):
            rows = [row for row in self.finals() if row.partial == partial]
            scores = ", ".join(f"{KINDS[row.kind][0]} {self.score(row):.4f}" for row in rows)
            unit = "val_loss" if self.nats == 1 else "val_bpb"
            if rows:
                text += f"   {'PARTIAL' if partial else unit}: {scores}"
        total = self.run.bytes_total
        return text if total is None else f"{text}   {total:,} bytes"


def nats_per_bpb(run: RunLog) -> float | None:
    """Return that of the score or, in a run that has not ended, of its last validation."""
    last = run.val[-1] if run.val else None
    return run.nats_per_bpb or (last.loss / last.bpb if last and last.bpb else None)


def on_challenge(run: RunLog) -> bool:
    """Say whether a run was validated on the challenge's split."""
    return (run.targets or 0) >= CHALLENGE_TARGETS


def names_of(runs: list[RunLog]) -> list[str]:
    """Return file names without suffix, after the folder's where the logs lie in several."""
    folders = {run.path.resolve().parent for run in runs}
    names = []
    for run in runs:
        parts = [run.path.resolve().parent.name, run.path.stem]
        parts = parts if len(folders) > 1 else parts[1:]
        short = [part if len(part) <= 30 else f"{part[:27]}..." for part in parts]
        # Matplotlib takes what stands between dollars for a formula.
        names.append("/".join(short).replace("$", r"\$"))
    return names


def curves_of(runs: list[RunLog]) -> list[Curve]:
    """Choose name, colour and unit: bits per byte where all runs state what one is.

    Raises ConfigError for a log without a curve, or too many.
    """
    looks = [(colour, style) for style in STYLES for colour in COLOURS]
    require(0 < len(runs) <= len(looks), f"{len(runs)} logs: expected 1 to {len(looks)}")
    for run in runs:
        drawable = run.train or run.val
        require(drawable, f"{run.path}: no training or validation curve in this log")
    ratios = [nats_per_bpb(run) for run in runs]
    if not all(ratios):
        ratios = [1.0] * len(runs)
    named = zip(runs, names_of(runs), looks, ratios, strict=False)
    return [Curve(run, name, *look, ratio) for run, name, look, ratio in named]


def y_range(curves: list[Curve], rows: list[Baseline]) -> tuple[float, float]:
    """Span the lowest value to the highest after the first steps, so that the end is readable."""
    shown = [row.val_bpb for row in rows]
    late, ends = [], []
    for curve in curves:
        scores = [curve.score(row) for row in curve.finals()]
        points = [(row.step, row.loss / curve.nats) for row in curve.run.train + curve.run.val]
        finite = [(step, y) for step, y in points if math.isfinite(y)]
        settled = [y for step, y in finite if step >= SETTLED * curve.run.steps]
        settled = settled or [y for _, y in finite]
        late += settled
        ends += [y for y in scores[-1:] or settled[-1:] if math.isfinite(y)]
        shown += [y for y in scores if math.isfinite(y)]
    limit = HEADROOM * max(ends, default=math.inf)
    shown += [min(y, limit) for y in late]
    require(shown, f"{curves[0].run.path}: no finite loss in this log")
    margin = 0.04 * (max(shown) - min(shown)) or 0.1
    return min(shown) - margin, max(shown) + margin


def draw_curve(axes, panel: str, curve: Curve) -> None:
    """Draw the training points and their running median, validation, final scores and events."""
    xs, ys = curve.points(panel, curve.run.train)
    look = {"color": curve.colour, "linestyle": curve.style}
    if len(xs) > MEDIAN_FROM:
        axes.plot(xs, ys, ".", color=curve.colour, markersize=3, alpha=0.25)
        windows = np.lib.stride_tricks.sliding_window_view(ys, MEDIAN_POINTS)
        middle = MEDIAN_POINTS // 2
        axes.plot(xs[middle:-middle], np.median(windows, axis=1), **look, label="median")
    else:
        axes.plot(xs, ys, **look, marker=".", linewidth=1, alpha=0.7, label="training")

    # A line from the untrained model would dive through all.
    trained = [row for row in curve.run.val if row.step > 0]
    if trained:
        axes.plot(*curve.points(panel, trained), **look, marker="o", label="validation")
    # Scores of one step stand side by side, not on each other.
    offset_copy = optional("matplotlib.transforms").offset_copy
    for place, row in enumerate(curve.finals()):
        name, marker = KINDS[row.kind]
        plain = {"linestyle": "", "color": curve.colour, "markerfacecolor": "none", "zorder": 4}
        plain["transform"] = offset_copy(axes.transData, axes.figure, x=8 * place, units="points")
        axes.plot([curve.end(panel)], [curve.score(row)], marker=marker, label=name, **plain)

    points = sorted(curve.run.train + curve.run.val, key=lambda point: point.step)
    timed = [(point.step, point.seconds) for point in points if point.seconds is not None]
    for event in curve.run.events:
        seconds = np.interp(event.step, *zip(*timed, strict=True)) if timed else None
        place = curve.x(panel, event.step, seconds)
        style = EVENTS[event.name]
        axes.axvline(place, color=curve.colour, linestyle=style, alpha=0.6, label=event.name)


def draw_panels(figure, curves: list[Curve], rows: list[Baseline], panels: list[str]) -> list:
    """Draw a column per x axis, the learning rate below if a log has it. Returns the top axes."""
    rates = [[row for row in curve.run.train if row.lr_scale is not None] for curve in curves]
    heights = [5, 1] if any(rates) else [5]
    shape = len(heights), len(panels)
    layout = {"sharex": "col", "sharey": "row", "squeeze": False, "height_ratios": heights}
    grid = figure.subplots(*shape, **layout)
    for panel, column in zip(panels, grid.T, strict=True):
        for curve, rate in zip(curves, rates, strict=True):
            draw_curve(column[0], panel, curve)
            if rate:
                xs, scales = curve.points(panel, rate)[0], [row.lr_scale for row in rate]
                column[1].plot(xs, scales, color=curve.colour, linestyle=curve.style)
        for row in rows:
            column[0].axhline(row.val_bpb, color="0.35", linestyle=(0, (5, 3)), linewidth=1)
        ends = [curve.end(panel) for curve in curves]
        unknown = sum(map(math.isnan, ends))
        silent = f" (not stated by {unknown} of {len(curves)} logs)" if unknown else ""
        column[-1].set_xlabel(PANELS[panel] + silent)
        column[0].set_xlim(0, 1.1 * max(end for end in ends if not math.isnan(end)) or 1)
        column[-1].xaxis.set_major_formatter(lambda x, _: f"{x:,g}")

    for axes in grid.flat:
        axes.grid(alpha=0.25)
    grid[0, 0].set_ylabel("nats per token" if curves[0].nats == 1 else "bits per byte")
    grid[0, 0].set_ylim(*y_range(curves, rows))
    if any(rates):
        grid[1, 0].set(ylabel="LR / peak", ylim=(0, 1.1))
    foreign = not all(on_challenge(curve.run) for curve in curves)
    for row in rows:
        name = "baseline" if row.pr == "baseline" else f"PR #{row.pr}"
        text = f"{name} {row.val_bpb:.4f}" + (", another validation text" if foreign else "")
        place = {"xy": (0.01, row.val_bpb), "xycoords": ("axes fraction", "data")}
        grid[0, 0].annotate(text, **place, va="bottom", fontsize=FONT, color="0.25")
    return list(grid[0])


def heading(curves: list[Curve], title: str) -> str:
    """Return the title, the number of runs, their hardware, and a warning where texts differ."""
    runs = [curve.run for curve in curves]
    hardware = " and ".join(dict.fromkeys(run.hardware for run in runs))
    single = curves[0].name if len(curves) == 1 else "Training curves"
    text = f"{title.replace('$', chr(92) + '$') or single}: "
    text += f"{len(runs)} run{'' if len(runs) == 1 else 's'} on {hardware}"
    if len({on_challenge(run) for run in runs}) > 1:
        text += "; not all on the same validation text"
    return text


def figure_of(runs: list[RunLog], rows: list[Baseline] | None = None, x="", title=""):
    """Return the matplotlib Figure: one panel for x, or one for each that some log allows.

    `rows` None: baseline and best, where the runs were validated on the challenge's split.
    Raises ConfigError.
    """
    curves = curves_of(runs)
    in_bits = curves[0].nats != 1
    unknown = "rows of the leaderboard are in bits per byte, and not every log says what one is"
    require(in_bits or not rows, unknown)
    if rows is None:
        challenge = in_bits and all(map(on_challenge, runs))
        rows = [find_row("baseline"), find_row("best")] if challenge else []
    panels = [name for name in PANELS if not all(math.isnan(curve.end(name)) for curve in curves)]
    require(not x or x in panels, f"--x {x}: no log states it")
    panels = [x] if x else panels

    width = 5 + 4 * len(panels)
    figure_class = optional("matplotlib.figure").Figure
    line = optional("matplotlib.lines").Line2D
    figure = figure_class(figsize=(width, 5.8 + 0.17 * len(curves)), layout="constrained")
    axes = draw_panels(figure, curves, rows, panels)[0]

    # One legend says which run has which colour and score, another what the marks mean.
    named = [line([], [], color=curve.colour, linestyle=curve.style) for curve in curves]
    labels = [curve.label() for curve in curves]
    plain = {"frameon": False, "fontsize": FONT}
    top = {"title": textwrap.fill(heading(curves, title), 12 * width), "title_fontsize": FONT + 2}
    figure.legend(named, labels, loc="outside upper left", alignment="left", **top, **plain)
    handles, meanings = axes.get_legend_handles_labels()
    marks = dict(zip(meanings, handles, strict=True))
    legend = figure.legend(
        marks.values(), marks, loc="outside lower left", ncols=2 * len(panels) + 3, **plain
    )
    for handle in legend.legend_handles:
        handle.set(color="0.3", alpha=1)
    return figure


def draw(runs: list[RunLog], path: Path, rows=None, x="", title="") -> None:
    """Write the picture of the runs to `path`, a PNG. Raises ConfigError."""
    write_atomically(path, figure_png(figure_of(runs, rows, x, title), DPI))


def main() -> None:
    """Draw the logs of the command line. Raises ConfigError; exits with 0 after --help."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG")
    add("--out", type=Path, metavar="PNG", help="default for one log: its name with suffix .png")
    add("--rows", nargs="*", metavar="PR", help="of the leaderboard: numbers, baseline, best")
    add("--x", choices=list(PANELS), default="", help="one panel instead of three")
    add("--title", default="", metavar="T")
    args = parser.parse_args()
    one = args.out is not None or len(args.logs) == 1
    require(one, f"{len(args.logs)} logs: --out PNG is required")
    out = args.out or args.logs[0].with_suffix(".png")
    fresh = out.suffix == ".png" and out not in args.logs
    require(fresh, f"--out {out}: expected a .png that is none of the logs")
    rows = None
    if args.rows is not None:
        rows = list({row.pr: row for row in map(find_row, args.rows)}.values())
    draw([RunLog.read(path) for path in args.logs], out, rows, args.x, args.title)
    print(out)


if __name__ == "__main__":
    run_entry_point(main)

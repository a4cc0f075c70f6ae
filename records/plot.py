"""Training logs as one picture: curves, learning rate, events, bytes of artifacts, rows of the leaderboard.

    python records/plot.py logs/RUN_ID.txt                                # logs/RUN_ID.png
    python records/plot.py logs/seed_*.txt --out seeds.png --title "Three seeds"
    python records/plot.py a.txt b.log --out both.png --x seconds --rows baseline 1394 best

Reads the logs of this trainer and of both upstream dialects. Rows of the leaderboard (PR numbers, baseline, best) are
drawn unasked, baseline and best, where the runs were validated on the challenge's split; --rows alone draws none.
"""

import argparse
import importlib
import io
import math
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from leaderboard import CHALLENGE_TARGETS, Row, find_row
from runlog import Final, Run

from train_gpt import MAX_SUBMISSION_BYTES, Refusal, require, run_entry_point, write_atomically

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe-Ito without its yellow
STYLES = ("-", "--")  # of the first seven runs, and of the next
PANELS = {"steps": "steps", "seconds": "seconds of training", "tokens": "million training tokens"}
KINDS = {
    "float": ("float", "D"),
    "roundtrip": ("quantized", "s"),
    "sliding": ("sliding", "v"),
    "ttt": ("TTT", "*"),
}
EVENTS = {"recurrence on": "--", "LR restart": ":", "clock stop": "-."}
MEDIAN_POINTS, MEDIAN_FROM = (
    15,
    60,
)  # window of the running median, and how many points it takes to draw one
TRAINING = (
    "training, every point",
    f"training, median of {MEDIAN_POINTS}",
)  # where there are as many
ORDER = [
    "training",
    *TRAINING,
    "validation",
    *(label for label, _ in KINDS.values()),
    *EVENTS,
]  # of the legend
SETTLED = 0.1  # fraction of the steps after which the loss has to be in the picture
HEADROOM = 1.6  # of the worst final loss: what is higher is cut off
DPI, FONT, LINE = 150, 9, 0.17  # points; height of a line of a legend in inches


@dataclass(frozen=True)
class Curve:
    """How one run is drawn. `nats` per token are 1 on the y axis: of a bit per byte, or 1 where that is not known."""

    run: Run
    name: str
    colour: str
    style: str
    nats: float

    def seconds_at(self, step: int) -> float:
        """By the clock of the log, linear between its lines; NaN for a log without a clock."""
        timed = sorted(
            (row.step, row.seconds)
            for row in self.run.train + self.run.val
            if row.seconds is not None
        )
        return float(np.interp(step, *zip(*timed, strict=True))) if timed else math.nan

    def x(self, panel: str, step: int, seconds: float | None) -> float:
        """Where a point of this step and second lies on the x axis of a panel; NaN, not drawn, where unknown."""
        tokens = self.run.tokens_per_step
        places = {"steps": step, "seconds": seconds, "tokens": tokens and step * tokens / 1e6}
        return math.nan if places[panel] is None else places[panel]

    def end(self, panel: str) -> float:
        return self.x(panel, self.run.steps, self.run.train_seconds)

    def line(self, panel: str, rows: list) -> tuple[list[float], list[float]]:
        """x and y of rows of Run.train or Run.val."""
        return [self.x(panel, row.step, row.seconds) for row in rows], [
            row.loss / self.nats for row in rows
        ]

    def finals(self) -> list[Final]:
        """The last score of each kind."""
        return [row for row in map(self.run.final, KINDS) if row is not None]

    def score_on_y(self, row: Final) -> float:
        return row.loss if self.nats == 1 else row.bpb

    def label(self) -> str:
        """Name and final scores. A part of the split is PARTIAL and has no val_bpb."""
        text, what = self.name, "val_loss" if self.nats == 1 else "val_bpb"
        for partial, prefix in ((False, what), (True, "PARTIAL")):
            rows = [row for row in self.finals() if row.partial == partial]
            scores = ", ".join(f"{KINDS[row.kind][0]} {self.score_on_y(row):.4f}" for row in rows)
            text += f"   {prefix}: {scores}" if rows else ""
        return text


def nats_per_bpb(run: Run) -> float | None:
    """Of the score or, in a run that has not ended, of its last validation."""
    last = run.val[-1] if run.val else None
    return run.nats_per_bpb or (last.loss / last.bpb if last and last.bpb else None)


def on_challenge(run: Run) -> bool:
    return (run.targets or 0) >= CHALLENGE_TARGETS


def literal(text: str) -> str:
    """`text` without what matplotlib would take for formulas."""
    return text.replace("$", r"\$")


def names_of(runs: list[Run]) -> list[str]:
    """File names without suffix, after the folder's name where the logs lie in several; each part shortened."""

    def short(name: str) -> str:
        return literal(name if len(name) <= 30 else f"{name[:27]}...")

    folders = [run.path.resolve().parent for run in runs]
    prefixes = [f"{short(folder.name)}/" if len(set(folders)) > 1 else "" for folder in folders]
    return [prefix + short(run.path.stem) for prefix, run in zip(prefixes, runs, strict=True)]


def curves_of(runs: list[Run]) -> list[Curve]:
    """In bits per byte where all runs state what one is. Raises Refusal for a log without a curve, or too many."""
    looks = [(colour, style) for style in STYLES for colour in COLOURS]
    require(0 < len(runs) <= len(looks), f"{len(runs)} logs: expected 1 to {len(looks)}")
    for run in runs:
        require(
            bool(run.train or run.val), f"{run.path}: no training or validation curve in this log"
        )
    ratios = [nats_per_bpb(run) for run in runs]
    ratios = ratios if all(ratios) else [1.0] * len(runs)
    named = zip(runs, names_of(runs), looks, ratios, strict=False)
    return [Curve(run, name, *look, ratio) for run, name, look, ratio in named]


def y_range(curves: list[Curve], rows: list[Row]) -> tuple[float, float]:
    """From the lowest value to the highest after the first steps: the end of the training has to be readable."""
    shown, settled, ends = [row.val_bpb for row in rows], [], []
    for curve in curves:
        finals = [curve.score_on_y(row) for row in curve.finals()]
        points = [(row.step, row.loss / curve.nats) for row in curve.run.train + curve.run.val]
        late = [y for step, y in points if step >= SETTLED * curve.run.steps and math.isfinite(y)]
        settled += late or [y for _, y in points if math.isfinite(y)]
        ends += [y for y in finals[-1:] or late[-1:] if math.isfinite(y)]
        shown += [y for y in finals if math.isfinite(y)]
    limit = HEADROOM * max(ends, default=math.inf)
    shown += [min(y, limit) for y in settled]
    require(bool(shown), f"{curves[0].run.path}: no finite loss in this log")
    margin = 0.04 * (max(shown) - min(shown)) or 0.1
    return min(shown) - margin, max(shown) + margin


# ---- Picture


def matplotlib(module: str):
    """A module of matplotlib; none is pyplot, so what is saved as PNG, Agg renders. Raises Refusal without it."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError:
        raise Refusal("needs matplotlib: pip install -r tests/requirements.txt") from None


def draw_curve(axes, panel: str, curve: Curve) -> None:
    """Training, light with a running median where there are many points; validation, final scores, events."""
    (xs, ys), look = (
        curve.line(panel, curve.run.train),
        {"color": curve.colour, "linestyle": curve.style},
    )
    if len(xs) > MEDIAN_FROM:
        axes.plot(xs, ys, ".", color=curve.colour, markersize=3, alpha=0.25, label=TRAINING[0])
        middle, windows = MEDIAN_POINTS // 2, range(len(ys) - MEDIAN_POINTS + 1)
        medians = [statistics.median(ys[i : i + MEDIAN_POINTS]) for i in windows]
        axes.plot(
            xs[middle : middle + len(medians)], medians, **look, linewidth=1.2, label=TRAINING[1]
        )
    elif xs:
        axes.plot(
            xs, ys, **look, marker=".", markersize=4, linewidth=1, alpha=0.7, label="training"
        )
    trained = [
        row for row in curve.run.val if row.step > 0
    ]  # a line from the untrained model would dive through all
    if trained:
        axes.plot(
            *curve.line(panel, trained),
            **look,
            marker="o",
            markersize=4,
            linewidth=1.8,
            label="validation",
        )
    offset, root = matplotlib("transforms").offset_copy, axes.get_figure(root=True)
    for row in curve.finals():
        label, marker = KINDS[row.kind]
        # Scores of one step stand side by side, not on each other.
        aside = offset(axes.transData, root, x=8 * list(KINDS).index(row.kind), units="points")
        plain = {
            "linestyle": "",
            "color": curve.colour,
            "mfc": "none",
            "mew": 1.1,
            "transform": aside,
            "zorder": 4,
        }
        axes.plot(curve.end(panel), curve.score_on_y(row), marker=marker, label=label, **plain)
    for event in curve.run.events:
        name = "clock stop" if event.name == "clock" else event.name
        place = curve.x(panel, event.step, curve.seconds_at(event.step))
        axes.axvline(
            place, color=curve.colour, linestyle=EVENTS[name], linewidth=0.9, alpha=0.6, label=name
        )


def draw_rows(axes_list: list, rows: list[Row], foreign: bool) -> None:
    """Dashed lines through all panels; the labels stand right of the last, pushed apart where the lines are close."""
    low, high = axes_list[-1].get_ylim()
    place, leader = (
        -1.0,
        {"arrowstyle": "-", "color": "0.35", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1},
    )
    for row in sorted(rows, key=lambda row: row.val_bpb):
        for axes in axes_list:
            axes.axhline(row.val_bpb, color="0.35", linestyle=(0, (5, 3)), linewidth=1)
        text = f"{'baseline' if row.pr == 'baseline' else f'PR #{row.pr}'} {row.val_bpb:.4f}"
        text += "\nanother validation text" if foreign else ""
        place = max((row.val_bpb - low) / (high - low), place + (0.1 if foreign else 0.055))
        axes_list[-1].annotate(
            text,
            (1, row.val_bpb),
            (1.03, place),
            xycoords=("axes fraction", "data"),
            textcoords="axes fraction",
            va="center",
            fontsize=FONT,
            color="0.25",
            arrowprops=leader,
        )


def draw_panels(part, curves: list[Curve], rows: list[Row], panels: list[str]):
    """A column per x axis, with one y axis, and the learning rate below if a log has it. Returns the first axes."""
    rates = [[row for row in curve.run.train if row.lr_scale is not None] for curve in curves]
    heights = [5, 1] if any(rates) else [5]
    grid = part.subplots(
        len(heights), len(panels), sharex="col", sharey="row", squeeze=False, height_ratios=heights
    )
    for panel, column in zip(panels, grid.T, strict=True):
        for curve, rate in zip(curves, rates, strict=True):
            draw_curve(column[0], panel, curve)
            if rate:
                places, scales = curve.line(panel, rate)[0], [row.lr_scale for row in rate]
                column[1].plot(places, scales, color=curve.colour, linestyle=curve.style)
        unknown = sum(math.isnan(curve.end(panel)) for curve in curves)
        text = (
            f"{PANELS[panel]} (not stated by {unknown} of {len(curves)} logs)"
            if unknown
            else PANELS[panel]
        )
        column[-1].set_xlabel(text)
        ends = [curve.end(panel) for curve in curves if not math.isnan(curve.end(panel))]
        column[0].set_xlim(0, 1.15 * max(ends) or 1)  # with room for the scores
        column[-1].locator_params(axis="x", nbins=6)
        column[-1].xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
    for axes in grid.flat:
        axes.grid(alpha=0.25)
    grid[0, 0].set_ylabel("nats per token" if curves[0].nats == 1 else "bits per byte")
    grid[0, 0].set_ylim(*y_range(curves, rows))
    if any(rates):
        grid[1, 0].set(ylabel="LR / peak", ylim=(0, 1.1))
    draw_rows(list(grid[0]), rows, not all(on_challenge(curve.run) for curve in curves))
    return grid[0, 0]


def sizes_of(run: Run) -> dict[str, int]:
    """Bytes of the artifact by role; code and model where the log has no table of this very artifact, {} without."""
    if run.bytes_code is None or run.bytes_model is None:
        return {}
    budget = dict(sorted(run.budget.items(), key=lambda item: -item[1]))
    known = sum(budget.values()) == run.bytes_model
    return {"code": run.bytes_code} | (budget if known else {"model": run.bytes_model})


def draw_sizes(part, curves: list[Curve], width: float) -> None:
    """A stacked bar per run in `width` inches. What is too narrow for a label is named below all bars."""
    axes, sizes, narrow = part.subplots(), [sizes_of(curve.run) for curve in curves], set()
    longest = max(sum(parts.values()) for parts in sizes)
    capped = longest > MAX_SUBMISSION_BYTES / 2
    right = 1.01 * max(longest, MAX_SUBMISSION_BYTES * capped)
    inches = (
        width - 2.6 - 0.075 * max(len(curve.name) for curve in curves)
    )  # of the bars, beside totals and names
    for y, (curve, parts) in enumerate(zip(curves, sizes, strict=True)):
        left = 0
        for shade, (role, size) in enumerate(parts.items()):
            axes.barh(
                y,
                size,
                left=left,
                color=curve.colour,
                alpha=(0.45, 0.25)[shade % 2],
                edgecolor="white",
            )
            text = f"{role} {size:,}"
            if size / right * inches > 0.072 * len(text):
                axes.text(left + size / 2, y, text, ha="center", va="center", fontsize=FONT - 1)
            else:
                narrow.add(role)
            left += size
        total = (
            f"{left:,} ({left / MAX_SUBMISSION_BYTES:.1%} of the cap)"
            if parts
            else "not in the log"
        )
        axes.annotate(
            total, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=FONT
        )
    if capped:
        axes.axvline(MAX_SUBMISSION_BYTES, color="black", linewidth=1)
    axes.set(ylim=(len(curves) - 0.5, -0.5), xlim=(0, right))
    axes.set_yticks(range(len(curves)), [curve.name for curve in curves], fontsize=FONT)
    axes.locator_params(axis="x", nbins=5)
    text = f"; without a label: {', '.join(sorted(narrow))}" if narrow else ""
    axes.set_xlabel("\n".join(textwrap.wrap("thousand bytes of code and model" + text, 70)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,g}")
    axes.spines[["top", "right"]].set_visible(False)


def draw_head(part, curves: list[Curve], axes, columns: int) -> None:
    """Two legends: the runs with their scores, and what the marks on `axes` mean, without a run's colour."""
    line, plain = (
        matplotlib("lines").Line2D,
        {"frameon": False, "fontsize": FONT, "labelspacing": 0.3},
    )
    runs = [
        line([], [], color=curve.colour, linestyle=curve.style, linewidth=2) for curve in curves
    ]
    part.legend(
        runs, [curve.label() for curve in curves], loc="upper left", borderaxespad=0, **plain
    )
    pairs = list(zip(*axes.get_legend_handles_labels(), strict=True))
    marks = {
        label: handle for handle, label in reversed(pairs)
    }  # of each the first, in the solid style
    labels = sorted(dict.fromkeys(label for _, label in pairs), key=ORDER.index)
    legend = part.legend(
        [marks[label] for label in labels], labels, loc="lower left", ncols=columns, **plain
    )
    for handle in legend.legend_handles:
        handle.set(color="0.3", alpha=1)


def heading(curves: list[Curve], title: str, width: int) -> str:
    """The title, the number of runs, their hardware, and a warning where they cannot be compared."""
    runs = [curve.run for curve in curves]
    hardware = " and ".join(dict.fromkeys(run.hardware for run in runs))
    name = literal(title) or (curves[0].name if len(curves) == 1 else "Training curves")
    text = f"{name}: {len(runs)} run{'s' * (len(runs) > 1)} on {hardware}"
    text += (
        "; not all on the same validation text"
        if len({on_challenge(run) for run in runs}) > 1
        else ""
    )
    return textwrap.fill(text, width)


def figure_of(
    runs: list[Run], rows: list[Row] | None = None, x: str | None = None, title: str = ""
):
    """The matplotlib Figure: one panel for x, or one for each that some log allows. Arguments are those of `draw`."""
    curves = curves_of(runs)
    bits = curves[0].nats != 1
    require(
        bits or not rows,
        "rows of the leaderboard are in bits per byte, and not every log says what one is",
    )
    if rows is None:
        rows = (
            [find_row(name) for name in ("baseline", "best")]
            if bits and all(map(on_challenge, runs))
            else []
        )
    panels = [
        panel for panel in PANELS if not all(math.isnan(curve.end(panel)) for curve in curves)
    ]
    require(x is None or x in panels, f"--x {x}: no log states it")
    panels = [x] if x else panels
    width, columns = (9, 5) if len(panels) == 1 else (14, 8)
    bars = any(sizes_of(run) for run in runs)
    text = heading(curves, title, 8 * width)
    heights = [LINE * (len(curves) + math.ceil(len(ORDER) / columns) + 1), 5.2] + [
        0.7 + 0.35 * len(curves)
    ] * bars
    size = width, sum(heights) + 0.3 * text.count("\n") + 0.4
    figure = matplotlib("figure").Figure(figsize=size, layout="constrained")
    figure.suptitle(text, fontsize=FONT + 3, fontweight="bold")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    axes = draw_panels(parts[1], curves, rows, panels)
    draw_head(parts[0], curves, axes, columns)
    if bars:
        draw_sizes(parts[2], curves, width)
    return figure


def draw(
    runs: list[Run],
    path: Path,
    rows: list[Row] | None = None,
    x: str | None = None,
    title: str = "",
) -> None:
    """Write the picture of the runs to `path`, a PNG. `rows` None: baseline and best, where the runs were validated on
    the challenge's split; `x`: steps, seconds or tokens, None for all. Raises Refusal."""
    png = io.BytesIO()
    figure_of(runs, rows, x, title).savefig(png, format="png", dpi=DPI)
    write_atomically(path, png.getvalue())


# ---- Command line


def main() -> None:
    """Draw the logs of the command line. Raises Refusal; exits with 0 after --help."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: require(False, f"{message} (more with --help)")
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="default for one log: its name with suffix .png"
    )
    parser.add_argument(
        "--rows", nargs="*", metavar="PR", help="of the leaderboard: PR numbers, baseline, best"
    )
    parser.add_argument("--x", choices=list(PANELS), help="one panel instead of three")
    parser.add_argument("--title", default="", metavar="T")
    args = parser.parse_args()
    require(
        args.out is not None or len(args.logs) == 1, f"{len(args.logs)} logs: --out PNG is required"
    )
    out = args.out or args.logs[0].with_suffix(".png")
    require(
        out.suffix == ".png" and out not in args.logs,
        f"--out {out}: expected a .png that is none of the logs",
    )
    rows = (
        None
        if args.rows is None
        else list({row.pr: row for row in map(find_row, args.rows)}.values())
    )
    draw([Run.read(path) for path in args.logs], out, rows, args.x, args.title)
    print(out)


if __name__ == "__main__":
    run_entry_point(main)

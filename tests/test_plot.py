"""What records/plot.py draws, and the rows of records/leaderboard.py beside it.   pytest tests/test_plot.py"""

import itertools
import math
import re
import statistics
import sys
from pathlib import Path

import leaderboard
import numpy as np
import plot
import pytest
from helpers_cli import assert_refused, run_command, run_in_process
from helpers_logs import BATCH, CODE, MODEL, NATS, ROLES, STEPS, new, old, ours, scores
from hypothesis import given, settings
from hypothesis import strategies as st
from runlog import Run

import train_gpt

needs_matplotlib = pytest.mark.skipif(
    not train_gpt.importlib.util.find_spec("matplotlib"), reason="no matplotlib"
)
FOREIGN = "another validation text"


def run_of(text: str, name: str = "run.txt") -> Run:
    return Run(Path(name), text, "")


def curve_panels(figure) -> list:
    """The axes of the curves, left to right: the first row of their part of the figure."""
    part = figure.axes[0].get_figure(root=False)
    return [axes for axes in part.axes if axes.get_subplotspec().rowspan.start == 0]


def lines_of(axes, label: str) -> list[tuple[list, list]]:
    """x and y of every line with this label."""
    return [
        (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
        if line.get_label() == label
    ]


def written_in(figure) -> list:
    """Every piece of text that is visible in the figure."""
    from matplotlib.text import Text

    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in written_in(figure))


def row_labels(figure) -> list[str]:
    return [text.get_text() for text in curve_panels(figure)[-1].texts]


@needs_matplotlib
def test_one_run_over_steps_seconds_and_tokens():
    figure = plot.figure_of([run_of(ours())])
    panels = curve_panels(figure)
    steps = [1, 100, 200, 300, 400]
    places = [steps, [step / 10 for step in steps], [step * BATCH / 1e6 for step in steps]]
    for axes, xs, end in zip(panels, places, (STEPS, 46.0, STEPS * BATCH / 1e6), strict=True):
        assert lines_of(axes, "training") == [
            (pytest.approx(xs), pytest.approx([(4 - x / 400) / NATS for x in steps]))
        ]
        for label, loss in (
            ("validation", 3.1),
            ("float", 3.1),
            ("quantized", 3.2),
            ("sliding", 3.15),
        ):
            assert lines_of(axes, label) == [
                ([pytest.approx(end)], [pytest.approx(loss / NATS)])
            ], label
    assert panels[0].get_ylabel() == "bits per byte"
    assert lines_of(panels[0], "clock stop")[0][0] == [400, 400]
    assert lines_of(panels[0], "LR restart")[0][0] == [300, 300]
    assert lines_of(panels[1], "recurrence on")[0][0] == pytest.approx([15.0, 15.0])
    rate = next(axes for axes in figure.axes if axes.get_ylabel() == "LR / peak")
    assert list(rate.lines[0].get_ydata()) == [1.0, 1.0, 0.4, 0.8, 0.1]
    assert "run: 1 run on CPU, 1 process of 2 threads" in texts(figure)
    assert "run   val_bpb: float 1.9375, quantized 2.0000, sliding 1.9688" in texts(figure)


@needs_matplotlib
@pytest.mark.parametrize("panel", plot.PANELS)
def test_x_draws_one_panel(panel):
    figure = plot.figure_of([run_of(ours())], x=panel)
    assert len(curve_panels(figure)) == 1
    assert plot.PANELS[panel] in texts(figure)


@needs_matplotlib
def test_runs_of_all_dialects_share_one_axis_in_bits_per_byte():
    runs = [run_of(ours(), "a.txt"), run_of(old(), "b.log"), run_of(new(), "c.log")]
    figure = plot.figure_of(runs, title="All of them")
    axes = curve_panels(figure)[0]
    colours = [line.get_color() for line in axes.lines if line.get_label() == "training"]
    assert colours == list(plot.COLOURS[:3])
    assert [ys[-1] for _, ys in lines_of(axes, "training")] == pytest.approx(
        [3 / NATS, 2 / NATS, 3.1906 / NATS]
    )
    assert lines_of(axes, "validation")[2][0] == [
        1000,
        1100,
    ]  # the untrained model is no part of the curve
    assert lines_of(axes, "TTT") == [([1100], [pytest.approx(3 / NATS)])]
    title = "All of them: 3 runs on CPU, 1 process of 2 threads and 8xH100 80GB HBM3 and unknown hardware; not all on"
    assert title in re.sub(r"\s+", " ", texts(figure))


@needs_matplotlib
def test_many_points_get_a_running_median_and_few_do_not():
    run = run_of(old(points=80))
    axes = curve_panels(plot.figure_of([run]))[0]
    raw, medians = (lines_of(axes, label)[0] for label in plot.TRAINING)
    assert raw == (
        [row.step for row in run.train],
        pytest.approx([row.loss / run.nats_per_bpb for row in run.train]),
    )
    half = plot.MEDIAN_POINTS // 2
    assert medians[0] == raw[0][half:-half]
    assert medians[1][10] == statistics.median(raw[1][10 : 10 + plot.MEDIAN_POINTS])
    assert lines_of(axes, "training") == []
    assert (
        lines_of(curve_panels(plot.figure_of([run_of(old(points=60))]))[0], plot.TRAINING[1]) == []
    )


@needs_matplotlib
def test_a_partial_score_is_never_a_val_bpb():
    text = texts(plot.figure_of([run_of(ours(partial=True))]))
    assert "PARTIAL: float 1.9375, quantized 2.0000, sliding 1.9688" in text
    assert "val_bpb" not in text
    assert "validation" not in text
    whole, part = ours(), ours(partial=True)
    stage = "sliding evaluation of"
    mixed = run_of(whole.partition(stage)[0] + stage + part.partition(stage)[2])
    label = "val_bpb: float 1.9375, quantized 2.0000   PARTIAL: sliding 1.9688"
    assert label in texts(plot.figure_of([mixed]))


@needs_matplotlib
def test_a_run_without_a_score_is_drawn_in_nats():
    killed = run_of(ours().partition("step:300/")[0])
    figure = plot.figure_of([killed])
    axes = curve_panels(figure)[0]
    assert axes.get_ylabel() == "nats per token"
    assert lines_of(axes, "training")[0][1] == [row.loss for row in killed.train]
    assert "val_bpb" not in texts(figure)
    both = plot.figure_of([killed, run_of(old())])
    assert curve_panels(both)[0].get_ylabel() == "nats per token"
    assert "val_loss: quantized 2.0727" in texts(both)
    assert row_labels(both) == []
    with pytest.raises(train_gpt.Refusal, match="bits per byte"):
        plot.figure_of([killed], [leaderboard.find_row("best")])


@needs_matplotlib
def test_a_run_in_progress_takes_its_ratio_from_its_validation():
    running = run_of(old().partition("stopping_early")[0])
    axes = curve_panels(plot.figure_of([running]))[0]
    assert axes.get_ylabel() == "bits per byte"
    assert lines_of(axes, "training")[0][1][-1] == pytest.approx(2.0 / NATS)


@needs_matplotlib
def test_rows_are_drawn_unasked_only_on_the_split_of_the_challenge():
    best = leaderboard.find_row("best")
    assert row_labels(plot.figure_of([run_of(old())])) == [
        f"PR #{best.pr} {best.val_bpb:.4f}",
        "baseline 1.2244",
    ]
    assert row_labels(plot.figure_of([run_of(old())], [])) == []
    for runs in ([run_of(ours())], [run_of(ours()), run_of(old(), "b.txt")]):
        assert row_labels(plot.figure_of(runs)) == []
        labels = row_labels(plot.figure_of(runs, [leaderboard.find_row("1394")]))
        assert labels == [f"PR #1394 1.0856\n{FOREIGN}"]
    assert FOREIGN not in texts(plot.figure_of([run_of(old())], [best]))


@needs_matplotlib
def test_labels_of_close_rows_do_not_overlap():
    from matplotlib.text import Text

    rows = [leaderboard.find_row(name) for name in ("2135", "2014", "1953", "1855", "baseline")]
    figure = plot.figure_of([run_of(new())], rows)
    figure.draw_without_rendering()
    panels = curve_panels(figure)
    for axes in panels:
        levels = [line.get_ydata()[0] for line in axes.lines if line.get_label().startswith("_")]
        assert levels == sorted(row.val_bpb for row in rows)
    boxes = sorted(
        map(Text.get_window_extent, panels[-1].texts), key=lambda box: box.y0
    )  # without their leaders
    assert all(one.y1 <= other.y0 for one, other in itertools.pairwise(boxes))
    assert all(box.x0 >= panels[-1].get_window_extent().x1 for box in boxes)


@needs_matplotlib
def test_the_bytes_of_the_artifact_by_role():
    figure = plot.figure_of([run_of(ours(), "a.txt"), run_of(old(), "b.txt")])
    axes = figure.axes[-1]
    bars = [(round(bar.get_y() + bar.get_height() / 2), bar.get_width()) for bar in axes.patches]
    widths = [[width for y, width in bars if y == place] for place in (0, 1)]
    assert widths == [[CODE, *sorted(ROLES.values(), reverse=True)], [47_642, 15_815_847]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert f"{MODEL + CODE:,} (1.5% of the cap)" in texts(figure)
    assert "15,863,489 (99.1% of the cap)" in texts(figure)
    estimated = run_of(
        ours().replace(f"quantized+zstd: {MODEL} bytes in", "quantized+zstd: 9 bytes in")
    )
    assert plot.sizes_of(estimated) == {"code": CODE, "model": 9}


@needs_matplotlib
def test_a_log_without_bytes_has_no_bar():
    started = run_of(old().partition("Serialized")[0], "b.txt")
    assert "code and model" not in texts(plot.figure_of([started]))
    assert "not in the log" in texts(plot.figure_of([run_of(ours(), "a.txt"), started]))


@needs_matplotlib
def test_a_log_that_does_not_state_its_tokens_has_two_panels():
    silent = run_of(re.sub("train_batch_tokens:.*", "", old()))
    assert len(curve_panels(plot.figure_of([silent]))) == 2
    with pytest.raises(train_gpt.Refusal, match="--x tokens"):
        plot.figure_of([silent], x="tokens")
    figure = plot.figure_of([silent, run_of(new(), "b.txt")])
    assert len(curve_panels(figure)) == 3
    assert "not stated by 1 of 2 logs" in texts(figure)


@needs_matplotlib
@pytest.mark.parametrize(("number", "x"), [(2, "steps"), (9, None)])
def test_no_text_is_smaller_than_8_points_or_outside_the_figure(number, x):
    runs = [
        run_of(ours(seed=seed), f"a_rather_long_name_of_a_run_with_seed_{seed}.txt")
        for seed in range(number)
    ]
    figure = plot.figure_of(runs, [leaderboard.find_row("1394")], x)
    figure.draw_without_rendering()
    written = written_in(figure)
    assert min(text.get_fontsize() for text in written) >= 8
    page = figure.bbox.padded(1)
    for text in written:
        if not re.fullmatch(
            r"[\d.,]+", text.get_text()
        ):  # ticks may lie beyond the end of an axis, unseen
            box = text.get_window_extent()
            assert page.contains(box.x0, box.y0), text
            assert page.contains(box.x1, box.y1), text


def test_names_are_told_apart_by_their_folders():
    runs = [
        run_of(old(), f"/records/{folder}/train_seed42.log")
        for folder in ("one", "2026-04-05_" + "x" * 60)
    ]
    assert plot.names_of(runs) == ["one/train_seed42", f"2026-04-05_{'x' * 16}.../train_seed42"]
    assert plot.names_of(runs[:1]) == ["train_seed42"]


@needs_matplotlib
def test_names_and_titles_are_no_formulas():
    figure = plot.figure_of([run_of(ours(), "_$x_{$.txt")], title="$1 {against $2")
    figure.draw_without_rendering()
    assert r"\$1 {against \$2" in texts(figure)
    assert r"_\$x_{\$   val_bpb" in texts(figure)


LOSSES = st.lists(st.floats(0.5, 12), min_size=1, max_size=30)


@settings(deadline=None, max_examples=30)
@given(losses=LOSSES, final=st.floats(0.5, 5), broken=st.booleans())
def test_the_y_range_has_the_end_of_every_run_and_little_of_its_start(losses, final, broken):
    lines = [
        f"step:{50 * (i + 1)}/999 train_loss:{loss:.4f} train_time:{i}ms"
        for i, loss in enumerate(losses)
    ]
    steps = 50 * (len(losses) + broken)
    lines += [f"step:{steps}/999 train_loss:nan train_time:99ms"] * broken
    text = "\n".join([*lines, f"final_roundtrip_exact {scores(final * NATS)}", ""])
    low, high = plot.y_range(plot.curves_of([run_of(text)]), [])
    assert low < final < high
    late = [loss / NATS for i, loss in enumerate(losses) if 50 * (i + 1) >= plot.SETTLED * steps]
    assert low <= min(late) + 1e-4
    top = max(final, min(max(losses) / NATS, plot.HEADROOM * final))
    assert high <= top + 0.05 * (top - low) + 0.11
    assert math.isfinite(high)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("a story\n", "no training or validation curve"),
        ("step:1/2 train_loss:nan train_time:5ms\n", "no finite loss"),
    ],
)
def test_logs_with_nothing_to_draw_are_refused(text, fragment):
    with pytest.raises(train_gpt.Refusal, match=fragment):
        plot.y_range(plot.curves_of([run_of(text)]), [])


@pytest.fixture
def logs(tmp_path):
    """A folder with a log of each dialect, and a way to run the command line in it."""
    for name, text in (
        ("ours.txt", ours()),
        ("old.log", old()),
        ("new.log", new()),
        ("story.txt", "Once.\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    return tmp_path, lambda *argv: run_in_process(plot.main, {}, tmp_path, *argv)


@needs_matplotlib
def test_the_command_line_writes_a_png_beside_the_log(logs, monkeypatch):
    monkeypatch.setattr(plot, "DPI", 30)
    folder, command = logs
    result = command("ours.txt")
    assert (result.code, result.out, result.err) == (0, "ours.png\n", "")
    png = (folder / "ours.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert np.frombuffer(png[16:24], ">u4")[0] == 14 * plot.DPI
    asked = ["--x", "seconds", "--rows", "best", "#2135", "--title", "T"]
    assert command("ours.txt", "new.log", "--out", "new/both.png", *asked).code == 0
    assert np.frombuffer((folder / "new/both.png").read_bytes()[16:24], ">u4")[0] == 9 * plot.DPI


@needs_matplotlib
def test_bad_input_is_refused_in_one_line(logs):
    folder, command = logs
    before = sorted(folder.iterdir())
    assert_refused(command(), "LOG")
    assert_refused(command("absent.txt"), "absent.txt: no such log")
    assert_refused(command("story.txt"), "story.txt: no training or validation curve")
    assert_refused(command("binary.txt"), "binary.txt: not UTF-8")
    assert_refused(command("ours.txt", "old.log"), "2 logs: --out PNG is required")
    assert_refused(command("old.log", "--rows", "7"), "7: no such row", "best", "baseline", "1394")
    assert_refused(command("old.log", "--x", "days"), "days", "steps")
    assert_refused(command("old.log", "--out", "old.log"), "--out old.log")
    assert_refused(command("old.log", "--out", "story.txt/x.png"), "story.txt")
    assert_refused(command(*["old.log"] * 15, "--out", "x.png"), "15 logs")
    assert sorted(folder.iterdir()) == before


def test_without_matplotlib_one_line_says_what_to_install(logs, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    folder, command = logs
    assert_refused(
        command("old.log"), "error: needs matplotlib: pip install -r tests/requirements.txt"
    )
    assert not (folder / "old.png").exists()


def test_help_has_examples_and_works_from_any_folder(tmp_path):
    result = run_command("records/plot.py", {}, tmp_path, "--help")
    assert result.code == 0
    assert "python records/plot.py logs/RUN_ID.txt" in result.out
    assert "matplotlib" not in result.err


def test_the_leaderboard():
    rows = leaderboard.read_rows()
    assert len({row.pr for row in rows}) == len(rows)
    assert [row.val_bpb for row in rows] == sorted(row.val_bpb for row in rows)
    assert leaderboard.find_row("best") == rows[0]
    assert leaderboard.find_row("1394") == leaderboard.find_row("#1394")
    assert leaderboard.find_row("1394").author == "Kevin Clark"
    assert leaderboard.find_row("baseline").val_bpb == 1.2243657
    for row in rows:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row.date)
        assert not row.seeds or statistics.mean(row.seeds) == pytest.approx(row.val_bpb, abs=1e-8)
    with pytest.raises(
        train_gpt.Refusal, match="naive: no such row of the leaderboard, choose best or one of 2135"
    ):
        leaderboard.find_row("naive")

"""What records/plot.py draws, and the rows of the leaderboard.   pytest tests/test_plot.py"""

import re
import statistics
import sys
from pathlib import Path

import leaderboard
import numpy as np
import plot
import pytest
from helpers_cli import assert_refused, run_in_process
from helpers_logs import BATCH, CODE, MODEL, NATS, STEPS, new, old, ours, scores
from runlog import RunLog

FOREIGN = "another validation text"


def run_of(text: str, name: str = "run.txt") -> RunLog:
    return RunLog(Path(name), text, "")


def panels_of(figure) -> list:
    """The axes of the curves, left to right: the first row of the grid."""
    return [axes for axes in figure.axes if axes.get_subplotspec().rowspan.start == 0]


def lines_of(axes, label: str) -> list[tuple[list, list]]:
    """x and y of every line with this label."""
    lines = [line for line in axes.lines if line.get_label() == label]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def written_in(figure) -> list:
    """Every piece of text that is visible in the figure."""
    text_class = pytest.importorskip("matplotlib.text").Text
    found = figure.findobj(text_class)
    return [text for text in found if text.get_text() and text.get_visible()]


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in written_in(figure))


def row_labels(figure) -> list[str]:
    return [text.get_text() for text in panels_of(figure)[0].texts]


def test_one_run_over_steps_seconds_and_tokens():
    figure = plot.figure_of([run_of(ours())])
    panels = panels_of(figure)
    steps = [1, 100, 200, 300, 400]
    places = [steps, [step / 10 for step in steps], [step * BATCH / 1e6 for step in steps]]
    losses = {"validation": 3.1, "float": 3.1, "quantized": 3.2, "sliding": 3.15}
    for axes, xs, end in zip(panels, places, (STEPS, 46.0, STEPS * BATCH / 1e6), strict=True):
        ys = [(4 - step / 400) / NATS for step in steps]
        assert lines_of(axes, "training") == [(pytest.approx(xs), pytest.approx(ys))]
        for label, loss in losses.items():
            point = ([pytest.approx(end)], [pytest.approx(loss / NATS)])
            assert lines_of(axes, label) == [point], label
    assert panels[0].get_ylabel() == "bits per byte"
    assert lines_of(panels[0], "clock")[0][0] == [400, 400]
    assert lines_of(panels[0], "LR restart")[0][0] == [300, 300]
    assert lines_of(panels[1], "recurrence on")[0][0] == pytest.approx([15.0, 15.0])
    # Where training ended between its lines, the time is that of the validation.
    ended = panels_of(plot.figure_of([run_of(new())], x="seconds"))[0]
    assert lines_of(ended, "clock")[0][0] == pytest.approx([118.136, 118.136])
    rate = next(axes for axes in figure.axes if axes.get_ylabel() == "LR / peak")
    assert list(rate.lines[0].get_ydata()) == [1.0, 1.0, 0.4, 0.8, 0.1]
    label = f"float 1.9375, quantized 2.0000, sliding 1.9688   {MODEL + CODE:,} bytes"
    assert f"run   val_bpb: {label}" in texts(figure)
    assert "run: 1 run on CPU, 1 process of 2 threads" in texts(figure)


def test_runs_of_all_dialects_share_one_axis_in_bits_per_byte():
    runs = [run_of(ours(), "a.txt"), run_of(old(), "b.log"), run_of(new(), "c.log")]
    figure = plot.figure_of(runs, title="All of them", x="steps")
    (axes,) = panels_of(figure)
    colours = [line.get_color() for line in axes.lines if line.get_label() == "training"]
    assert colours == list(plot.COLOURS[:3])
    ends = [ys[-1] for _, ys in lines_of(axes, "training")]
    assert ends == pytest.approx([3 / NATS, 2 / NATS, 3.1906 / NATS])
    # The untrained model is no part of the curve.
    assert lines_of(axes, "validation")[2][0] == [1000, 1100]
    assert lines_of(axes, "TTT") == [([1100], [pytest.approx(3 / NATS)])]
    text = " ".join(texts(figure).split())
    assert "All of them: 3 runs on CPU, 1 process of 2 threads and 8xH100 80GB HBM3 and" in text
    assert "not all on the same validation text" in text


def test_many_points_get_a_running_median_and_few_do_not():
    run = run_of(old(points=80))
    axes = panels_of(plot.figure_of([run], x="steps"))[0]
    xs, medians = lines_of(axes, "median")[0]
    ys = [row.loss / run.nats_per_bpb for row in run.train]
    half = plot.MEDIAN_POINTS // 2
    assert xs == [row.step for row in run.train][half:-half]
    assert medians[10] == pytest.approx(statistics.median(ys[10 : 10 + plot.MEDIAN_POINTS]))
    assert lines_of(axes, "training") == []
    few = plot.figure_of([run_of(old(points=60))], x="steps")
    assert lines_of(panels_of(few)[0], "median") == []


def test_a_partial_score_is_never_a_val_bpb():
    text = texts(plot.figure_of([run_of(ours(partial=True))], x="steps"))
    assert "PARTIAL: float 1.9375, quantized 2.0000, sliding 1.9688" in text
    assert "val_bpb" not in text
    assert "validation" not in text
    whole, part = ours(), ours(partial=True)
    stage = "sliding evaluation of"
    mixed = run_of(whole.partition(stage)[0] + stage + part.partition(stage)[2])
    label = plot.curves_of([mixed])[0].label()
    assert "val_bpb: float 1.9375, quantized 2.0000   PARTIAL: sliding 1.9688" in label


def test_the_unit_is_bits_per_byte_only_where_every_log_says_what_one_is():
    killed = run_of(ours().partition("step:300/")[0])
    figure = plot.figure_of([killed, run_of(old())], x="steps")
    assert panels_of(figure)[0].get_ylabel() == "nats per token"
    assert lines_of(panels_of(figure)[0], "training")[0][1] == [row.loss for row in killed.train]
    assert "val_bpb" not in texts(figure)
    assert "val_loss: quantized 2.0727" in texts(figure)
    assert row_labels(figure) == []
    # A run in progress takes its ratio from its validation.
    running = run_of(old().partition("stopping_early")[0])
    assert plot.curves_of([running])[0].nats == pytest.approx(NATS)


def test_rows_are_drawn_unasked_only_on_the_split_of_the_challenge():
    best = leaderboard.find_row("best")
    both = ["baseline 1.2244", f"PR #{best.pr} {best.val_bpb:.4f}"]
    assert row_labels(plot.figure_of([run_of(old())], x="steps")) == both
    assert row_labels(plot.figure_of([run_of(old())], [], x="steps")) == []
    mixed = [run_of(ours()), run_of(old(), "b.txt")]
    assert row_labels(plot.figure_of(mixed, x="steps")) == []
    labels = row_labels(plot.figure_of(mixed, [leaderboard.find_row("1394")], x="steps"))
    assert labels == [f"PR #1394 1.0856, {FOREIGN}"]


def test_a_log_that_does_not_state_its_tokens_has_two_panels():
    silent = run_of(re.sub("train_batch_tokens:.*", "", old()))
    assert len(panels_of(plot.figure_of([silent]))) == 2
    figure = plot.figure_of([silent, run_of(new(), "b.txt")], x="tokens")
    assert "not stated by 1 of 2 logs" in texts(figure)


@pytest.mark.parametrize(("number", "x"), [(2, "steps"), (9, "")])
def test_no_text_is_smaller_than_8_points_or_outside_the_figure(number, x):
    names = [f"a_rather_long_name_of_a_run_with_seed_{seed}.txt" for seed in range(number)]
    runs = [run_of(ours(seed=seed), name) for seed, name in enumerate(names)]
    figure = plot.figure_of(runs, [leaderboard.find_row("1394")], x, title="$1 {against $2")
    figure.draw_without_rendering()
    assert r"\$1 {against \$2" in texts(figure)
    written = written_in(figure)
    assert min(text.get_fontsize() for text in written) >= 8
    page = figure.bbox.padded(1)
    for text in written:
        # Ticks may lie beyond the end of an axis, unseen.
        if not re.fullmatch(r"[\d.,]+", text.get_text()):
            box = text.get_window_extent()
            assert page.contains(box.x0, box.y0), text
            assert page.contains(box.x1, box.y1), text


def test_names_are_told_apart_by_their_folders_and_are_no_formulas():
    folders = ("one", "2026-04-05_" + "x" * 60)
    runs = [run_of(old(), f"/records/{folder}/train_seed42.log") for folder in folders]
    assert plot.names_of(runs) == ["one/train_seed42", f"2026-04-05_{'x' * 16}.../train_seed42"]
    assert plot.names_of(runs[:1]) == ["train_seed42"]
    assert plot.names_of([run_of(old(), "_$x_{$.txt")]) == [r"_\$x_{\$"]


def test_the_y_range_has_the_end_of_every_run_and_little_of_its_start():
    steps = range(50, 1050, 50)
    losses = [9.0 if step < 150 else 5 - 3 * step / 1000 for step in steps]
    for final in (2.0, 4.0):
        pairs = zip(steps, losses, strict=True)
        lines = [f"step:{s}/999 train_loss:{loss} train_time:{s}ms" for s, loss in pairs]
        lines += ["step:1000/999 train_loss:nan train_time:99ms"]
        lines += [f"final_roundtrip_exact {scores(final * NATS)}", ""]
        low, high = plot.y_range(plot.curves_of([run_of("\n".join(lines))]), [])
        assert low < min(final, losses[-1] / NATS)
        assert final < high <= max(1.7 * final, losses[3] / NATS + 0.2)


@pytest.fixture
def logs(tmp_path):
    """A folder with a log of each dialect, and a way to run the command line in it."""
    written = {"ours.txt": ours(), "old.log": old(), "new.log": new(), "story.txt": "Once.\n"}
    written |= {"nan.txt": "step:1/2 train_loss:nan train_time:5ms\n"}
    for name, text in written.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path, lambda *argv: run_in_process(plot.main, {}, tmp_path, *argv)


def test_the_command_line_writes_a_png_beside_the_log(logs, monkeypatch):
    monkeypatch.setattr(plot, "DPI", 30)
    folder, command = logs
    result = command("ours.txt")
    assert (result.code, result.out, result.err) == (0, "ours.png\n", "")
    png = (folder / "ours.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    asked = ["--x", "seconds", "--rows", "best", "#2135", "--title", "T"]
    assert command("ours.txt", "new.log", "--out", "new/both.png", *asked).code == 0
    widths = [
        np.frombuffer((folder / name).read_bytes()[16:20], ">u4")[0]
        for name in ("ours.png", "new/both.png")
    ]
    assert widths[0] > widths[1] > 0, "one panel is narrower than three"


def test_bad_input_is_refused_in_one_line(logs):
    folder, command = logs
    before = sorted(folder.iterdir())
    assert_refused(command(), "LOG", "--help")
    assert "python records/plot.py logs/RUN_ID.txt" in command("--help").out
    assert_refused(command("absent.txt"), "absent.txt: no such log")
    assert_refused(command("story.txt"), "story.txt: no training or validation curve")
    assert_refused(command("nan.txt"), "nan.txt: no finite loss")
    assert_refused(command("ours.txt", "old.log"), "2 logs: --out PNG is required")
    assert_refused(command("old.log", "--rows", "7"), "7: no such row", "best", "baseline", "1394")
    assert_refused(command("nan.txt", "--rows", "best"), "bits per byte")
    assert_refused(command("nan.txt", "--x", "tokens"), "--x tokens: no log states it")
    assert_refused(command("old.log", "--x", "days"), "days", "steps")
    assert_refused(command("old.log", "--out", "old.log"), "--out old.log")
    assert_refused(command("old.log", "--out", "story.txt/x.png"), "story.txt")
    assert_refused(command(*["old.log"] * 15, "--out", "x.png"), "15 logs")
    assert sorted(folder.iterdir()) == before


def test_without_matplotlib_one_line_says_what_to_install(logs, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    folder, command = logs
    missing = "error: needs matplotlib: pip install -r tests/requirements.txt"
    assert_refused(command("old.log"), missing)
    assert not (folder / "old.png").exists()


def test_the_rows_of_the_leaderboard_are_in_order_and_consistent():
    rows = list(leaderboard.read_rows().values())
    assert [row.val_bpb for row in rows] == sorted(row.val_bpb for row in rows)
    assert leaderboard.find_row("best") == rows[0]
    assert leaderboard.find_row("1394") == leaderboard.find_row("#1394")
    assert leaderboard.find_row("baseline").val_bpb == 1.2243657
    for row in rows:
        assert not row.seeds or statistics.mean(row.seeds) == pytest.approx(row.val_bpb, abs=1e-7)

"""What records/plot.py draws, and the rows of the leaderboard.   pytest tests/test_plot.py"""

import re
import statistics
import sys
from pathlib import Path

import leaderboard
import plot
import pytest
from helpers_cli import assert_refused, run_in_process
from helpers_logs import CODE, MODEL, NATS, STEPS, new, old, ours, scores, short
from runlog import RunLog


def run_of(text: str, name: str = "run.txt") -> RunLog:
    return RunLog(Path(name), text, "")


def lines_of(figure, label: str) -> list[tuple[list, list]]:
    """x and y of every line with this label."""
    lines = [line for line in figure.axes[0].lines if line.get_label() == label]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def written_in(figure) -> list:
    """Every piece of text that is visible in the figure."""
    text_class = pytest.importorskip("matplotlib.text").Text
    found = figure.findobj(text_class)
    return [text for text in found if text.get_text() and text.get_visible()]


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in written_in(figure))


@pytest.mark.parametrize(("x", "unit", "end"), [("steps", 1, STEPS), ("seconds", 0.1, 46.0)])
def test_one_run_over_steps_or_seconds(x, unit, end):
    figure = plot.figure_of([run_of(ours())], x)
    steps = [1, 100, 200, 300, 400]
    curve = [pytest.approx([step * unit for step in steps])]
    curve += [pytest.approx([(4 - step / 400) / NATS for step in steps])]
    assert lines_of(figure, "training") == [tuple(curve)]
    losses = {"validation": 3.1, "float": 3.1, "quantized": 3.2, "sliding": 3.15}
    for label, loss in losses.items():
        point = ([pytest.approx(end)], [pytest.approx(loss / NATS)])
        assert lines_of(figure, label) == [point], label
    assert figure.axes[0].get_ylabel() == "bits per byte"
    label = "float 1.9375   quantized 2.0000   sliding 1.9688"
    assert f"run   {label}   {MODEL + CODE:,} bytes" in texts(figure)
    assert "1 run on CPU, 1 process of 2 threads" in texts(figure)


def test_runs_of_all_dialects_share_one_axis_in_bits_per_byte():
    logs = {"a.txt": ours(), "b.log": old(), "c.log": new(), "d.log": short()}
    figure = plot.figure_of(
        [run_of(text, name) for name, text in logs.items()], title="All of them"
    )
    lines = [line for line in figure.axes[0].lines if line.get_label() == "training"]
    assert [line.get_color() for line in lines] == list(plot.COLOURS[:4])
    ends = [line.get_ydata()[-1] for line in lines]
    assert ends == pytest.approx([y / NATS for y in (3, 2, 3.1906, 3.2883)])
    # The untrained model is no part of the curve.
    assert lines_of(figure, "validation")[2][0] == [1000, 1100]
    assert lines_of(figure, "TTT") == [([1100], [pytest.approx(3 / NATS)])]
    text = " ".join(texts(figure).split())
    assert "All of them: 4 runs on CPU, 1 process of 2 threads and 8xH100 80GB HBM3 and" in text


def test_a_partial_score_is_marked_and_no_validation():
    figure = plot.figure_of([run_of(ours(partial=True))])
    label = "PARTIAL float 1.9375   PARTIAL quantized 2.0000   PARTIAL sliding 1.9688"
    assert f"run   {label}   " in texts(figure)
    assert lines_of(figure, "validation") == []
    whole, part = ours(), ours(partial=True)
    stage = "sliding evaluation of"
    mixed = run_of(whole.partition(stage)[0] + stage + part.partition(stage)[2])
    label = plot.curves_of([mixed])[0].label()
    assert "   float 1.9375   quantized 2.0000   PARTIAL sliding 1.9688" in label


def test_the_unit_is_bits_per_byte_only_where_every_log_says_what_one_is():
    killed = run_of(ours().partition("step:300/")[0])
    figure = plot.figure_of([killed, run_of(old())])
    assert figure.axes[0].get_ylabel() == "nats per token"
    assert lines_of(figure, "training")[0][1] == [row.loss for row in killed.train]
    assert "quantized 2.0727" in texts(figure)
    # A run in progress takes its ratio from its validation.
    running = run_of(old().partition("stopping_early")[0])
    assert plot.curves_of([running])[0].nats == pytest.approx(NATS)


def test_no_text_is_smaller_than_8_points_or_outside_the_figure():
    names = [f"a_rather_long_name_of_a_run_with_seed_{seed}.txt" for seed in range(9)]
    runs = [run_of(ours(seed=seed), name) for seed, name in enumerate(names)]
    figure = plot.figure_of(runs, title="$1 {against $2")
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
    short, long = plot.names_of(runs)
    assert short == "one/train_seed42"
    assert re.fullmatch(r"\.\.\.x+/train_seed42", long)
    assert len(long) == 60
    assert plot.names_of(runs[:1]) == ["train_seed42"]
    assert plot.names_of([run_of(old(), "_$x_{$.txt")]) == [r"_\$x_{\$"]


def shown_range(losses: dict[int, float], final: float) -> tuple[float, float]:
    """The y axis in nats per token for a curve, by step, and a final score."""
    lines = [f"step:{step}/999 train_loss:{loss} train_time:9ms" for step, loss in losses.items()]
    lines += [f"final_roundtrip_exact {scores(final)}", ""]
    low, high = plot.y_range(plot.curves_of([run_of("\n".join(lines))]))
    return low * NATS, high * NATS


def test_the_y_axis_shows_the_last_two_thirds_of_a_curve_and_its_score():
    losses = {step: 9 - 6 * step / 1000 for step in range(50, 1050, 50)} | {700: float("nan")}
    for final in (2.5, 8.0):
        low, high = shown_range(losses, final)
        assert min(final, 3.0) - 0.4 < low < min(final, 3.0)
        assert max(final, losses[350]) < high < max(final + 0.3, losses[300])


def test_all_of_a_curve_of_few_points_is_shown():
    # As a run logs that lasts a few seconds: its first ten steps, and one after.
    losses = {step: 7.0 - 0.3 * step for step in range(1, 11)} | {200: 2.2}
    low, high = shown_range(losses, 2.13)
    assert low < 2.13
    assert high > losses[1]


@pytest.fixture
def logs(tmp_path):
    """A folder with a log of each dialect, and a way to run the command line in it."""
    written = {"ours.txt": ours(), "old.log": old(), "new.log": new(), "story.txt": "Once.\n"}
    written |= {"nan.txt": "step:1/2 train_loss:nan train_time:5ms\n"}
    written |= {"timeless.txt": "step:1/2 train_loss:3.0\n"}
    for name, text in written.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path, lambda *argv: run_in_process(plot.main, {}, tmp_path, *argv)


def test_the_command_line_writes_a_png_beside_the_log_or_where_it_is_told(logs, monkeypatch):
    monkeypatch.setattr(plot, "DPI", 30)
    folder, command = logs
    result = command("ours.txt")
    assert (result.code, result.out, result.err) == (0, "ours.png\n", "")
    asked = ["--x", "seconds", "--title", "T"]
    assert command("ours.txt", "new.log", "--out", "new/both.png", *asked).code == 0
    for name in ("ours.png", "new/both.png"):
        png = (folder / name).read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert png.endswith(b"IEND\xaeB`\x82")


def test_bad_input_is_refused_in_one_line(logs):
    folder, command = logs
    before = sorted(folder.iterdir())
    assert_refused(command(), "LOG", "--help")
    assert "python records/plot.py logs/RUN_ID.txt" in command("--help").out
    assert_refused(command("absent.txt"), "absent.txt: no such log")
    assert_refused(command("story.txt"), "story.txt: no training or validation curve")
    assert_refused(command("nan.txt"), "nan.txt: no finite loss")
    assert_refused(command("ours.txt", "old.log"), "2 logs: --out PNG is required")
    timeless = command("ours.txt", "timeless.txt", "--x", "seconds", "--out", "x.png")
    assert_refused(timeless, "--x seconds: timeless.txt does not state it")
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

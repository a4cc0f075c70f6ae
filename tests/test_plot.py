"""What records/plot.py draws, and the rows of the leaderboard.   pytest tests/test_plot.py"""

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


def texts(figure) -> str:
    """Return every piece of text that is visible in the figure."""
    found = figure.findobj(pytest.importorskip("matplotlib.text").Text)
    return "\n".join(text.get_text() for text in found if text.get_visible())


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
    runs = [run_of(text, name) for name, text in logs.items()]
    figure = plot.figure_of(runs, title="All of them")
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


def test_the_unit_is_bits_per_byte_only_where_every_log_says_what_one_is():
    killed = run_of(ours().partition("step:300/")[0])
    figure = plot.figure_of([killed, run_of(old())], title="$1 against $2")
    assert figure.axes[0].get_ylabel() == "nats per token"
    assert lines_of(figure, "training")[0][1] == [row.loss for row in killed.train]
    assert "quantized 2.0727" in texts(figure)
    assert r"\$1 against \$2" in texts(figure)


@pytest.mark.parametrize("final", [2.5, 8.0])
def test_the_y_axis_shows_the_last_two_thirds_of_a_curve_and_its_score(final):
    losses = {step: 9 - 6 * step / 1000 for step in range(50, 1050, 50)} | {700: float("nan")}
    lines = [f"step:{step}/999 train_loss:{loss} train_time:9ms" for step, loss in losses.items()]
    lines += [f"final_roundtrip_exact {scores(final)}", ""]
    low, high = plot.figure_of([run_of("\n".join(lines))]).axes[0].get_ylim()
    assert min(final, 3.0) - 0.4 < low * NATS < min(final, 3.0)
    assert max(final, losses[350]) < high * NATS < max(final + 0.3, losses[300])


def test_the_command_line_writes_a_png_or_refuses_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "DPI", 30)
    written = {"ours.txt": ours(), "old.log": old(), "story.txt": "Once.\n"}
    written |= {"nan.txt": "step:1/2 train_loss:nan train_time:5ms\n"}
    written |= {"timeless.txt": "step:1/2 train_loss:3.0\n"}
    for name, text in written.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    def command(*argv: str):
        return run_in_process(plot.main, {}, tmp_path, *argv)

    assert_refused(command("absent.txt"), "absent.txt: no such log")
    assert_refused(command("story.txt"), "story.txt: no training or validation curve")
    assert_refused(command("nan.txt"), "nan.txt: no finite loss")
    assert_refused(command("ours.txt", "old.log"), "2 logs: --out PNG is required")
    assert_refused(command("timeless.txt", "--x", "seconds"), "timeless.txt does not state it")
    assert_refused(command("old.log", "--out", "old.log"), "--out old.log")
    assert_refused(command(*["old.log"] * 15, "--out", "x.png"), "15 logs")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        missing = "needs matplotlib: pip install -r tests/requirements.txt"
        assert_refused(command("old.log"), missing)
    assert {path.name for path in tmp_path.iterdir()} == written.keys()

    result = command("ours.txt")
    assert (result.code, result.out, result.err) == (0, "ours.png\n", "")
    assert command("ours.txt", "old.log", "--out", "new/both.png", "--x", "seconds").code == 0
    for name in ("ours.png", "new/both.png"):
        png = (tmp_path / name).read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert png.endswith(b"IEND\xaeB`\x82")


def test_the_rows_of_the_leaderboard_are_in_order_and_consistent():
    rows = list(leaderboard.read_rows().values())
    assert [row.val_bpb for row in rows] == sorted(row.val_bpb for row in rows)
    for row in rows:
        assert not row.seeds or statistics.mean(row.seeds) == pytest.approx(row.val_bpb, abs=1e-7)

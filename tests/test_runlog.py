"""What records/runlog.py reads in the logs of three dialects.   pytest tests/test_runlog.py"""

import math
import re

import pytest
from helpers_cli import assert_refused, run_in_process
from helpers_logs import (
    AUDIT,
    BATCH,
    CODE,
    MODEL,
    NATS,
    ROLES,
    SOURCE,
    STEPS,
    TARGETS,
    new,
    old,
    ours,
    scores,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runlog import RULE, Event, Run, Train, Val, main, one_line

from train_gpt import Refusal

LOGS = {"ours": ours, "old": old, "new": new}


@pytest.fixture
def read(tmp_path):
    """A Run of the text, through a file."""

    def read_text(text: str) -> Run:
        path = tmp_path / "run.log"
        path.write_text(text, encoding="utf-8")
        return Run.read(path)

    return read_text


@pytest.mark.parametrize("dialect", LOGS)
def test_each_dialect_is_known_by_its_lines(dialect, read):
    run = read(LOGS[dialect](seed=7))
    assert run.dialect == dialect
    assert run.seed == 7
    assert f"{run.dialect}, seed 7, {len(run.train)} + {len(run.val)} points" in one_line(run)


def test_curves_of_our_dialect(read):
    run = read(ours())
    assert run.train[0] == Train(1, 0.1, 3.9975, 1.0)
    assert [(row.step, row.seconds, row.lr_scale) for row in run.train[1:]] == [
        (100, 10.0, 1.0),
        (200, 20.0, 0.4),
        (300, 30.0, 0.8),
        (400, 40.0, 0.1),
    ]
    assert run.val == [Val(STEPS, 46.0, 3.1, 3.1 / NATS)]
    assert (run.steps, run.train_seconds, run.eval_seconds) == (STEPS, 46.0, 11.0)
    assert (run.tokens_per_step, run.targets, run.scored_bytes, run.params) == (
        BATCH,
        TARGETS,
        12_000,
        675_212,
    )
    assert run.hardware == "CPU, 1 process of 2 threads"
    assert run.versions == {
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "numpy": "2.4.6",
        "commit": "3d916ea",
    }
    assert run.evaluation["window"] == "256"
    assert run.evaluation["ttt"] == "off"


def test_curves_of_the_old_dialect(read):
    run = read(old(points=20))
    assert len(run.train) == 20
    assert run.train[-1] == Train(1000, 40.0, 2.0, None)
    assert [row.step for row in run.val] == [0, 250, 500, 750, 1000]
    assert run.val[1] == Val(250, 10.0, 2.75, 1.71875)
    assert (run.steps, run.train_seconds, run.tokens_per_step) == (1000, 40.038, 524_288)
    assert run.hardware == "8xH100 80GB HBM3"
    assert run.versions == {"python": "3.12.3", "torch": "2.9.1+cu128"}


def test_curves_of_the_new_dialect_are_timed_in_minutes(read):
    run = read(new())
    assert [(row.step, row.seconds) for row in run.train] == [
        (1, 0.0),
        (500, 48.0),
        (1000, pytest.approx(102)),
    ]
    assert [(row.step, row.seconds) for row in run.val] == [
        (0, 0.0),
        (1000, pytest.approx(102)),
        (1100, 118.136),
    ]
    assert (run.steps, run.train_seconds, run.tokens_per_step, run.targets) == (
        1100,
        118.136,
        786_432,
        45_508_608,
    )


def test_a_unix_time_before_every_line_changes_nothing(read):
    plain = read(new())
    stamped = read(re.sub("^", "1776012345.678901 ", new(), flags=re.M))
    for what in (
        "train",
        "val",
        "finals",
        "bytes_total",
        "bytes_code",
        "knobs",
        "steps",
        "targets",
        "params",
    ):
        assert getattr(stamped, what) == getattr(plain, what), what


def test_the_score_is_that_of_the_strongest_evaluation(read):
    text = new()
    for kind, bpb in (("ttt", 3.0), ("sliding", 3.01), ("roundtrip", 3.05)):
        run = read(text)
        assert (run.score.kind, run.score.bpb) == (kind, pytest.approx(bpb / NATS))
        text = text.replace(run.score.label + " ", "unrelated: ")
    assert read(text).score is None
    assert read(new()).final("float").loss == 3.02
    assert read(new()).nats_per_bpb == pytest.approx(NATS)


def test_the_score_of_our_own_is_that_of_the_last_evaluation(read):
    run = read(ours())
    assert (run.score.kind, run.score.loss, run.score.bpb) == ("sliding", 3.15, 3.15 / NATS)
    assert [run.final(kind).loss for kind in ("float", "roundtrip", "sliding")] == [3.1, 3.2, 3.15]
    tuned = read(ours(ttt="sgd"))
    assert (tuned.score.kind, tuned.score.loss, tuned.evaluation["ttt"]) == ("ttt", 3.15, "sgd")
    unscored = read(ours().partition("sliding evaluation of")[0])
    assert (unscored.score.kind, unscored.score.loss) == ("roundtrip", 3.2)


def test_a_score_has_the_digits_of_its_exact_line_and_the_time_of_the_other(read):
    run = read(old())
    assert (run.score.bpb, run.score.seconds) == (1.29543707, 1.401)
    assert run.score.loss == 2.07269931


def test_partial_scores_are_marked_and_no_validation(read):
    run = read(ours(partial=True))
    assert run.finals
    assert all(row.partial for row in run.finals)
    assert run.val == []
    assert run.score.partial
    assert run.score.bpb == pytest.approx(3.15 / NATS)
    assert not any(row.partial for row in read(ours()).finals)


def test_bytes_are_those_of_the_last_total_and_never_of_the_raw_checkpoint(read):
    for text in (old(), new()):
        run = read(text)
        assert run.bytes_total == run.bytes_code + run.bytes_model < 16_000_000
    assert read(old()).bytes_total == 15_863_489
    assert (
        read(old() + "Total submission size int6+lzma: 15900000 bytes\n").bytes_total == 15_900_000
    )
    raw = "".join(line for line in old().splitlines(True) if "int8" not in line)
    assert (read(raw).bytes_model, read(raw).bytes_total) == (None, None)


def test_the_budget_is_the_table_of_the_artifact_not_of_the_dry_run(read):
    run = read(ours())
    assert run.budget == ROLES
    assert (run.bytes_model, run.bytes_code, run.bytes_total) == (MODEL, CODE, MODEL + CODE)
    assert read(new()).budget == {}


def test_events(read):
    assert read(ours()).events == [
        Event(150, "recurrence on"),
        Event(300, "LR restart"),
        Event(400, "clock"),
    ]
    assert read(new()).events == [Event(700, "recurrence on"), Event(1100, "clock")]


def test_audit_rows(read):
    assert read(ours()).audit == AUDIT.splitlines()[2:]
    assert read(old()).audit == []


@pytest.mark.parametrize("dialect", LOGS)
def test_a_configuration_is_the_same_for_all_seeds_and_places(dialect, read):
    places = {"ours": {"run_id": "elsewhere"}, "old": {}, "new": {"directory": "/mnt/elsewhere"}}[
        dialect
    ]
    one, other = read(LOGS[dialect](seed=1)), read(LOGS[dialect](seed=2, **places))
    assert one.configuration == other.configuration
    assert "train_batch_tokens" in one.configuration
    assert "matrix_lr" in one.configuration or dialect == "old"
    changed = re.sub("(train_batch_tokens: ?)", r"\g<1>1", LOGS[dialect](seed=1))
    assert read(changed).configuration != one.configuration


def test_the_source_is_split_off(read):
    run = read(ours())
    assert run.source == SOURCE
    assert "import torch" not in run.text
    assert read(new()).source == ""
    assert read(old()).source == SOURCE
    quoted = SOURCE + 'print("step:3/9 train_loss:1.0 train_time:5ms")\n'
    assert [row.step for row in read(old(points=2).replace(SOURCE, quoted)).train] == [50, 100]


@pytest.mark.parametrize("dialect", ["ours", "old"])
def test_of_two_runs_in_one_file_the_last_counts(dialect, read):
    write = LOGS[dialect]
    both, last = read(write(seed=1) + write(seed=2)), read(write(seed=2))
    for what in ("seed", "source", "train", "val", "finals", "events", "bytes_total", "steps"):
        assert getattr(both, what) == getattr(last, what), what


def test_a_run_that_was_killed_has_what_it_wrote(read):
    run = read(ours().partition("step:300/")[0])
    assert (run.dialect, len(run.train), run.steps, run.train_seconds) == ("ours", 3, 200, 20.0)
    assert (run.val, run.finals, run.score, run.nats_per_bpb, run.bytes_total) == (
        [],
        [],
        None,
        None,
        None,
    )
    assert "no score" in one_line(run)


def test_of_a_foreign_text_nothing_is_guessed(read):
    run = read("Once upon a time\nthere were 3/4 of a cake.\n")
    assert (run.dialect, run.train, run.val, run.finals, run.events, run.budget, run.knobs) == (
        "unknown",
        [],
        [],
        [],
        [],
        {},
        {},
    )
    assert {
        run.seed,
        run.steps,
        run.score,
        run.bytes_total,
        run.targets,
        run.params,
        run.tokens_per_step,
    } == {None}


def test_a_loss_that_is_not_finite_is_read(read):
    text = new().replace("train_loss: 3.1906", "train_loss: nan")
    assert math.isnan(read(text).train[-1].loss)


def test_no_log_and_no_text_are_refused(tmp_path):
    with pytest.raises(Refusal, match="no such log"):
        Run.read(tmp_path / "absent.txt")
    path = tmp_path / "model.ptz"
    path.write_bytes(b"step:1/2 \xff\xfe")
    with pytest.raises(Refusal, match="not UTF-8 at byte 9"):
        Run.read(path)


def test_the_summary_of_a_run_and_its_refusal(tmp_path):
    for name, text in (
        ("ours.txt", ours()),
        ("partial.txt", ours(partial=True)),
        ("old.log", old()),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert_refused(
        run_in_process(main, {}, tmp_path, "--summary", "old.log"), "old.log", "no train_summary"
    )
    assert run_in_process(main, {}, tmp_path, "ours.txt", "old.log").out.count("\n") == 2


POINTS = st.lists(
    st.tuples(
        st.integers(1, 99),
        st.integers(1, 60_000),
        st.floats(0, 20).map(lambda loss: round(loss, 4)),
    ),
    min_size=1,
    max_size=8,
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(gaps=POINTS, validated=st.booleans())
def test_what_is_written_is_read_in_every_dialect(read, gaps, validated):
    """Steps and milliseconds are sums of the gaps, so that both grow along the log."""
    step, clock, expected, lines = 0, 0, [], {"ours": [], "old": [], "new": []}
    for more_steps, more_ms, loss in gaps:
        step, clock = step + more_steps, clock + more_ms
        expected.append((step, clock / 1000, loss))
        lines["ours"].append(
            f"step:{step}/999 train_loss:{loss:.6f} train_time:{clock}ms lr_scale:1.000 tok/s: 9"
        )
        lines["old"].append(
            f"step:{step}/999 train_loss:{loss:.4f} train_time:{clock}ms step_avg:1.00ms"
        )
        lines["new"].append(
            f"{step}/999 train_loss: {loss:.4f} train_time: {clock / 60_000:.1f}m tok/s: 9"
        )
        if validated:
            lines["new"].append(f"{step}/999 {scores(loss + 1)}")
            for dialect in ("ours", "old"):
                lines[dialect].append(f"step:{step}/999 {scores(loss + 1)} train_time:{clock}ms")
    for dialect, written in lines.items():
        run = read("\n".join(written) + "\n")
        assert [(row.step, row.loss) for row in run.train] == [
            (step, loss) for step, _, loss in expected
        ]
        slack = 3.001 if dialect == "new" else 0  # seconds, of the one digit of its minutes
        for row, (_, seconds, _) in zip(run.train, expected, strict=True):
            assert row.seconds == pytest.approx(seconds, abs=slack)
        assert [(row.step, row.loss) for row in run.val] == [
            (step, pytest.approx(loss + 1)) for step, _, loss in expected if validated
        ]
        assert [row.seconds for row in run.val] == [row.seconds for row in run.train if validated]
        assert run.steps == step


@given(st.text(max_size=200))
@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)
def test_no_text_after_a_log_breaks_the_reader(read, tail):
    run = read(f"{new()}{RULE}\n{tail.encode('utf-8', 'ignore').decode()}")
    assert run.train[:3] == read(new()).train
    assert one_line(run)


def test_a_closing_line_that_was_cut_off_does_not_count(read):
    text = ours()
    run = read(text[: text.rindex("}")])
    assert "eval_summary" not in run.json_events
    assert "train_summary" in run.json_events

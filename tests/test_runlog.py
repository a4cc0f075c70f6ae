"""What records/runlog.py reads in the logs of three dialects.   pytest tests/test_runlog.py"""

import json
import math
import re

import pytest
from helpers_cli import assert_refused, run_in_process
from helpers_logs import AUDIT, CODE, MODEL, NATS, SOURCE, new, old, ours, scores, short
from runlog import RULE, Point, RunLog, main, summary

LOGS = {"ours": ours, "old": old, "new": new}


@pytest.fixture
def read(tmp_path):
    """A RunLog of the text, through a file."""

    def read_text(text: str) -> RunLog:
        path = tmp_path / "run.log"
        path.write_text(text, encoding="utf-8")
        return RunLog.read(path)

    return read_text


# ---- Each dialect


def test_curves_and_facts_of_our_dialect(read):
    run = read(ours())
    assert run.train[0] == Point(1, 0.1, 3.9975)
    seconds = [(row.step, row.seconds) for row in run.train[1:]]
    assert seconds == [(100, 10.0), (200, 20.0), (300, 30.0), (400, 40.0)]
    assert run.val == [Point(400, 46.0, 3.1, round(3.1 / NATS, 8))]
    assert (run.steps, run.train_seconds, run.eval_seconds) == (400, 46.0, 11.0)
    assert (run.targets, run.scored_bytes) == (5_000, round(NATS / math.log(2) * 5_000))
    assert (run.seed, run.params, run.hardware) == (1337, 675_212, "CPU, 1 process of 2 threads")
    assert (run.versions["torch"], run.versions["commit"]) == ("2.13.0+cpu", "3d916ea")
    assert (run.evaluation["window"], run.evaluation["ttt"]) == ("256", "off")
    assert (run.bytes_model, run.bytes_code, run.bytes_total) == (MODEL, CODE, MODEL + CODE)
    assert run.audit == AUDIT
    assert run.recurs


def test_curves_and_facts_of_the_old_dialect(read):
    run = read(old(points=20))
    assert len(run.train) == 20
    assert run.train[-1] == Point(1000, 40.0, 2.0)
    assert [row.step for row in run.val] == [0, 250, 500, 750, 1000]
    assert run.val[1] == Point(250, 10.0, 2.75, pytest.approx(2.75 / NATS))
    assert (run.steps, run.train_seconds, run.targets) == (1000, 40.038, 62_021_632)
    assert (run.seed, run.hardware, run.audit) == (1337, "8xH100 80GB HBM3", "")
    # The digits of the exact line, and the time of the other.
    expected = (2.07269931, round(2.07269931 / NATS, 8), 1.401)
    assert (run.score.loss, run.score.bpb, run.score.seconds) == expected
    assert run.bytes_total == run.bytes_code + run.bytes_model == 15_863_489
    again = old() + "Total submission size int6+lzma: 15900000 bytes\n"
    assert read(again).bytes_total == 15_900_000
    raw = "".join(line for line in old().splitlines(True) if "int8" not in line)
    assert (read(raw).bytes_model, read(raw).bytes_total) == (None, None)


def test_curves_and_facts_of_the_new_dialect_whose_clock_is_in_minutes(read):
    run = read(new())
    expected = [(1, 0.0), (500, 48.0), (1000, pytest.approx(102))]
    assert [(row.step, row.seconds) for row in run.train] == expected
    expected = [(0, 0.0), (1000, pytest.approx(102)), (1100, 118.136)]
    assert [(row.step, row.seconds) for row in run.val] == expected
    assert (run.steps, run.train_seconds, run.targets) == (1100, 118.136, 45_508_608)
    assert run.bytes_total == run.bytes_code + run.bytes_model == 15_988_983
    assert run.recurs
    # A Unix time before every line changes nothing.
    stamped = read(re.sub("^", "1776012345.678901 ", new(), flags=re.M))
    assert (stamped.train, stamped.val, stamped.finals) == (run.train, run.val, run.finals)
    assert (stamped.knobs, stamped.bytes_total) == (run.knobs, run.bytes_total)


def test_seed_bytes_and_curve_of_logs_whose_lines_say_loss_alone(read):
    run = read(short(seed=7))
    assert run.seed == 7
    assert run.train == [Point(1000, 91.478, 3.3120), Point(2000, 183.345, 3.2883)]
    assert (run.bytes_total, run.bytes_code) == (15_993_853, 70_853)
    assert (run.score.kind, run.score.loss, run.score.seconds) == ("sliding", 3.0, 429.311)
    assert (run.steps, run.train_seconds) == (2000, 183.4)
    assert run.configuration == read(short(seed=8)).configuration
    assert run.configuration["matrix_lr"] == "0.04"


@pytest.mark.parametrize("dialect", LOGS)
def test_a_configuration_is_the_same_for_all_seeds_and_places(dialect, read):
    elsewhere = {"ours": {"run_id": "x"}, "old": {}, "new": {"directory": "/mnt/x"}}[dialect]
    one, other = read(LOGS[dialect](seed=1)), read(LOGS[dialect](seed=2, **elsewhere))
    assert one.configuration == other.configuration
    changed = re.sub("(train_batch_tokens: ?)", r"\g<1>1", LOGS[dialect](seed=1))
    assert read(changed).configuration != one.configuration


# ---- Scores


def test_the_score_of_a_stranger_is_the_best_of_the_quantized_model(read):
    text = new()
    for kind, bpb in (("ttt", 3.0), ("sliding", 3.01), ("roundtrip", 3.05)):
        run = read(text)
        assert (run.score.kind, run.score.bpb) == (kind, pytest.approx(bpb / NATS))
        text = text.replace(run.score.label + " ", "unrelated: ")
    assert read(text).score is None
    # Test-time training that failed is not what was submitted.
    worse = read(new() + f"final_int6_ttt {scores(3.5)} eval_time:405410ms\n")
    assert (worse.score.kind, worse.score.loss) == ("sliding", 3.01)


def test_our_own_score_is_that_of_the_last_evaluation(read):
    run = read(ours())
    assert (run.score.kind, run.score.loss, run.score.bpb) == ("sliding", 3.15, 3.15 / NATS)
    assert [run.final(kind).loss for kind in ("float", "roundtrip", "sliding")] == [3.1, 3.2, 3.15]
    tuned = read(ours(ttt="sgd"))
    assert (tuned.score.kind, tuned.score.loss, tuned.evaluation["ttt"]) == ("ttt", 3.15, "sgd")
    mixed = {"val_loss": 3.1, "val_bpb": 3.1 / NATS}
    text = ours().replace('"ttt": "off"}', f'"ttt": "off", "ngram": {json.dumps(mixed)}}}')
    complete = '"bytes_total": 9, "bytes_code": 4, "bytes_model": 5, "artifact_path": "x", "steps"'
    text = text.replace('"steps"', complete)
    remembered = read(text.replace("total_eval", f"final_ngram_exact {scores(3.1)}\ntotal_eval"))
    assert (remembered.score.kind, remembered.score.bpb) == ("ngram", 3.1 / NATS)
    assert remembered.final("sliding").loss == 3.15
    # In the closing summary, too, which gives the seconds of the whole evaluation.
    assert f"; with a memory of n-grams {3.1 / NATS:.4f})" in summary(remembered)
    assert "in 400 steps, 11.0 s" in summary(remembered)
    part = json.dumps(mixed | {"val_bpb": None})
    text = ours(partial=True).replace('"ttt": "off"}', f'"ttt": "off", "ngram": {part}}}')
    text = text.replace("total_eval", f"final_ngram_exact {scores(3.1, 'PARTIAL')}\ntotal_eval")
    assert "; with a memory of n-grams PARTIAL" in summary(read(text.replace('"steps"', complete)))


# ---- Whole files


@pytest.mark.parametrize("between", ["", f"{RULE}\nSource code:\n{RULE}\n"])
def test_settings_that_stand_before_the_source_are_read(between, read):
    settings, rest = new(seed=7).split("train_shards", 1)
    log = f"{RULE}\n{settings}{between}import torch\n{RULE}\ntrain_shards{rest}"
    for run in (read(log), read(log.replace("seed: 7", "seed: 8") + log)):
        assert (run.seed, run.source) == (7, "import torch\n")
        assert run.configuration == read(new()).configuration


def test_the_source_is_no_part_of_the_curve(read):
    quoted = SOURCE + 'print("step:3/9 train_loss:1.0 train_time:5ms")\n'
    run = read(old(points=2).replace(SOURCE, quoted))
    assert run.source == quoted
    assert [row.step for row in run.train] == [50, 100]


@pytest.mark.parametrize("dialect", ["ours", "old"])
def test_of_two_runs_in_one_file_the_last_counts(dialect, read):
    write = LOGS[dialect]
    both, last = read(write(seed=1) + write(seed=2)), read(write(seed=2))
    assert (both.seed, both.source) == (last.seed, last.source)
    assert (both.train, both.val, both.finals) == (last.train, last.val, last.finals)


def test_a_run_that_was_killed_has_what_it_wrote(read):
    text = ours()
    run = read(text.partition("step:300/")[0])
    assert (len(run.train), run.steps, run.train_seconds) == (3, 200, 20.0)
    assert (run.val, run.finals) == ([], [])
    assert (run.score, run.nats_per_bpb, run.bytes_total) == (None, None, None)
    unscored = read(text.partition("sliding evaluation of")[0])
    assert (unscored.score.kind, unscored.score.loss) == ("roundtrip", 3.2)
    # A closing line that was cut off does not count.
    assert read(text[: text.rindex("}")]).json_events.keys() == {"train_summary"}
    run = read("Once upon a time\nthere were 3/4 of a cake.\n")
    assert (run.train, run.val, run.finals, run.knobs) == ([], [], [], {})
    assert {run.seed, run.steps, run.score, run.bytes_total, run.targets, run.params} == {None}


def test_the_command_line_summarises_and_refuses(tmp_path):
    for name, text in (("ours.txt", ours()), ("old.log", old())):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "model.ptz").write_bytes(b"step:1/2 \xff\xfe")

    def run(*argv: str):
        return run_in_process(main, {}, tmp_path, *argv)

    first, second = run("ours.txt", "old.log").out.splitlines()
    assert "seed 1337, 5 + 1 points" in first
    assert second.startswith("old.log: ")
    assert_refused(run("--summary", "old.log"), "old.log", "no train_summary")
    assert_refused(run("absent.txt"), "absent.txt: no such log")
    assert_refused(run("model.ptz"), "model.ptz: not UTF-8 at byte 9")
    assert_refused(run(), "LOG", "--help")

"""Records folders: made from logs, packed, checked, refused.   pytest tests/test_records.py"""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import check_record
import helpers_logs
import leaderboard
import make_record
import pytest
from check_record import FAIL, PASS, REMARK, UNKNOWN
from helpers_cli import (
    ROOT,
    Result,
    assert_refused,
    cli_env,
    eval_env,
    full_environment,
    run_in_process,
    write_dataset,
)
from runlog import RunLog

import eval_sliding
import train_gpt

SOURCE = train_gpt.submission_source()
FIXED = ["--name", "Tiny", "--author", "A. Name", "--date", "2026-11-24"]


@dataclass(frozen=True)
class Workshop:
    """A data set, the logs of seeds 1, 2 and, PARTIAL, of 3, and a folder of the first two."""

    place: Path
    env: dict[str, str]
    folder: Path

    def log(self, seed: int) -> Path:
        return self.place / "logs" / f"s{seed}.txt"


def change(path: Path, pattern: str, replacement) -> None:
    """Replace a pattern, which has to occur, in a file."""
    text = path.read_text()
    assert re.search(pattern, text, re.M), pattern
    path.write_text(re.sub(pattern, replacement, text, flags=re.M))


def make(tmp_path: Path, logs: list[Path], *arguments: object) -> Result:
    """Run make_record.py as on the command line."""
    argv = [*FIXED, "--output", tmp_path / "records", *arguments, "--logs", *logs]
    return run_in_process(make_record.main, {}, tmp_path, *argv)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """A picture takes a second, which all but one of these tests can do without."""
    monkeypatch.setattr(make_record, "draw", lambda runs, path: None)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    place = tmp_path_factory.mktemp("workshop")
    data = write_dataset(place / "data")
    for seed, more in {1: {}, 2: {}, 3: {"VAL_MAX_TOKENS": 100}}.items():
        env = cli_env(data, SEED=seed, RUN_ID=f"s{seed}", **more)
        artifact = place / "logs" / f"s{seed}.ptz"
        runs = [(train_gpt.main, env, []), (eval_sliding.main, eval_env(data, **more), [artifact])]
        if seed == 1:
            runs.append((eval_sliding.main, eval_env(data), ["--audit", artifact]))
        for entry, knobs, argv in runs:
            result = run_in_process(entry, knobs, place, *argv)
            assert result.code == 0, result
        change(artifact.with_suffix(".txt"), r"commit:(\w+(-dirty)?)$", "commit:0123abc")
    # In this scope, unlike in the tests, the picture is drawn.
    result = make(place, [place / "logs" / f"s{seed}.txt" for seed in (2, 1)])
    assert result.code == 0, result
    folder = Path(result.out.splitlines()[-1])
    assert folder == place / "records" / "track_non_record_16mb" / "2026-11-24_Tiny"
    return Workshop(place, cli_env(data, SEED=1, RUN_ID="again"), folder)


@pytest.fixture
def copy(workshop, tmp_path) -> Path:
    return shutil.copytree(workshop.folder, tmp_path / "track_non_record_16mb" / "2026-11-24_Tiny")


# ---- The folder. That its figures are those of the logs, check_record.py says below.


def test_the_folder_holds_what_accepted_records_hold(workshop):
    expected = {"README.md", "submission.json", "requirements.txt", "train_gpt.py", "training.png"}
    logs = {"train_seed1.log", "train_seed2.log"}
    assert {path.name for path in workshop.folder.iterdir()} == expected | logs
    assert (workshop.folder / LOG1).read_bytes() == workshop.log(1).read_bytes()
    versions = (workshop.folder / "requirements.txt").read_text()
    assert f"torch=={train_gpt.torch.__version__.split('+')[0]}\n" in versions
    found = json.loads((workshop.folder / JSON).read_text())
    assert (found["author"], found["track"]) == ("A. Name", "non_record_16mb")

    text = (workshop.folder / "README.md").read_text()
    assert len(re.findall(r"^\| C[1-4] .* \| pass \|$", text, re.M)) == 4
    assert "`ROUTING=zipf`" in text
    assert "EVAL_STRIDE=8" in text
    assert re.search(r"^export OMP_NUM_THREADS=\d+ ", text, re.M), "it decides how sums are rounded"
    assert "for SEED in 1 2; do\n  SEED=$SEED RUN_ID=seed$SEED python train_gpt.py\n" in text


def test_the_previous_row_is_compared_in_both_units(workshop, tmp_path):
    logs = [workshop.log(1), workshop.log(2)]
    result = make(tmp_path, logs, "--previous", workshop.folder)
    assert result.code == 0, result
    text = Path(result.out.splitlines()[-1], "README.md").read_text()
    assert "0.00000 bits per byte, 0.00000 nats per token; Welch, one-sided: p = 0.5 that" in text
    other = ["--name", "Other", "--previous"]
    assert_refused(make(tmp_path, logs, *other, "1394"), "1394: validated on another text")
    assert_refused(make(tmp_path, logs, *other, "9999"), "9999: no such row", "1394")


@pytest.mark.slow
def test_the_packed_script_alone_trains_and_scores_to_the_figures_of_the_log(workshop, tmp_path):
    script = shutil.copy(workshop.folder / SCRIPT, tmp_path)
    for arguments in ([], ["eval_sliding.py", "logs/again.ptz"]):
        command = [sys.executable, script, *arguments]
        subprocess.run(command, cwd=tmp_path, env=full_environment(workshop.env), check=True)
    first, again = RunLog.read(workshop.log(1)), RunLog.read(tmp_path / "logs" / "again.txt")
    assert again.score.bpb == first.score.bpb
    assert (again.bytes_code, again.bytes_model) == (first.bytes_code, first.bytes_model)
    assert again.code_hashes == first.code_hashes == {hashlib.sha256(SOURCE).hexdigest()}


# ---- What make_record.py refuses


def edited(log: Path, tmp_path: Path, *changes: tuple) -> Path:
    """Return a copy of a log with every pattern replaced, each of which has to occur."""
    edited = Path(shutil.copy(log, tmp_path / f"edited_{log.name}"))
    for pattern, replacement in changes:
        change(edited, pattern, replacement)
    return edited


def test_a_commit_that_nobody_can_check_out_is_refused_unless_it_is_allowed(workshop, tmp_path):
    for number, commit in enumerate(("0123abc-dirty", "4567def", "unknown")):
        second = edited(workshop.log(2), tmp_path, ("commit:0123abc", f"commit:{commit}"))
        logs = [workshop.log(1), second]
        assert_refused(make(tmp_path, logs), "0123abc", commit, "--allow-commit")
        assert not (tmp_path / "records").exists() or number
        named = make(tmp_path, logs, "--allow-commit", "--name", f"N{number}")
        assert named.code == 0, named


def test_logs_that_no_option_makes_a_record_are_refused(workshop, tmp_path):
    first, second = workshop.log(1), workshop.log(2)
    foreign = edited(second, tmp_path, (r"^code_sha256:\w+", "code_sha256:" + "0" * 64))
    assert_refused(make(tmp_path, [first, foreign]), "made by other code", "0123abc")
    recounted = edited(second, tmp_path, (r"^Code size: \d+", "Code size: 12345"))
    assert_refused(make(tmp_path, [recounted]), "counts 12,345 bytes of code", "another liblzma")
    assert_refused(make(tmp_path, [first, first]), "several logs of one seed: [1, 1]")
    assert_refused(make(tmp_path, [tmp_path / "none.txt"]), "none.txt: no such log")
    assert_refused(make(tmp_path, [workshop.log(3)]), "a PARTIAL score")
    upstream = tmp_path / "upstream.log"
    upstream.write_text(helpers_logs.new())
    assert_refused(make(tmp_path, [upstream]), "no finished run of this trainer")
    unscored = edited(second, tmp_path, (r"(?s)^sliding evaluation of .*", ""))
    assert_refused(make(tmp_path, [unscored]), "the log states no ")
    assert not (tmp_path / "records").exists()


def test_bad_arguments_are_refused_in_one_line(workshop, tmp_path):
    log = [workshop.log(1)]
    assert_refused(make(tmp_path, log, "--name", "../a"), "--name '../a'")
    assert_refused(make(tmp_path, log, "--date", "yesterday"), "--date", "yesterday")
    assert_refused(make(tmp_path, log, "--blurb", "a\n## Results"), "--blurb", "one line of ASCII")
    assert_refused(make(tmp_path, []), "--logs: name one finished log per seed")
    assert_refused(make(tmp_path, log, "--track", "fast"), "--track", "--help")
    assert make(tmp_path, [], "--dry-run").code == 0
    assert not (tmp_path / "records").exists()
    assert make(tmp_path, log).code == 0
    assert_refused(make(tmp_path, log), "exists already")


def test_a_full_disk_leaves_no_folder(workshop, tmp_path, monkeypatch):
    def full(path, data):
        train_gpt.require(False, f"cannot write {path}: No space left on device")

    monkeypatch.setattr(make_record, "write_atomically", full)
    assert_refused(make(tmp_path, [workshop.log(1)]), "No space left on device")
    assert list((tmp_path / "records" / "track_non_record_16mb").iterdir()) == []


# ---- What check_record.py finds, and statistics


def found_in(folder: Path, *argv: object) -> dict[str, list[tuple[str, str]]]:
    """Return severity and text of the findings by check, as the command line prints them."""
    result = run_in_process(check_record.main, {}, folder.parent, folder, *argv)
    header, _, *rows = result.out.splitlines()
    assert header == "| check | finding | result |", result
    found = {}
    for row in rows:
        name, text, severity = row.removeprefix("| ").removesuffix(" |").split(" | ")
        found.setdefault(name, []).append((severity, text))
    fails = any(severity == FAIL for findings in found.values() for severity, _ in findings)
    assert (result.code, result.err) == (int(fails), "")
    return found


def problems(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the findings that are a remark or fail."""
    found = found_in(folder).items()
    return {name: findings for name, findings in found if findings[0][0] in (REMARK, FAIL)}


def assert_found(folder: Path, check: str, severity: str, text: str) -> None:
    found = problems(folder)
    assert any(s == severity and text in said for s, said in found.get(check, [])), found
    # What is only in the paperwork touches no other check.
    if check in (JSON, "scores") or severity == REMARK:
        assert set(found) <= {check, "files"}, found


def resubmit(folder: Path, **fields: object) -> None:
    """Change keys of submission.json; None takes one away."""
    path = folder / "submission.json"
    merged = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))


def stranger(tmp_path: Path, logs: dict[str, str], **fields: object) -> Path:
    """Make a folder that competes, of logs by their paths and keys of submission.json."""
    folder = tmp_path / "track_10min_16mb" / "2026-04-05_Stranger"
    for name, text in logs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / JSON).write_text(json.dumps(fields))
    return folder


JSON = "submission.json"
LOG1, LOG2, SCRIPT = "train_seed1.log", "train_seed2.log", "train_gpt.py"
TOTAL = r"^(Total submission .*): \d+"
WRONG = [  # a file, what is done to it, the check that finds it, how grave it is, and its words
    (JSON, {"val_bpb": True}, JSON, FAIL, "val_bpb is true"),
    (JSON, {"val_bpb": 10**400}, JSON, FAIL, "val_bpb is 1000"),
    (JSON, {"val_loss": float("nan")}, JSON, FAIL, "val_loss is NaN"),
    (JSON, {"github_id": None}, JSON, REMARK, "no github_id"),
    (JSON, {"date": "May 1"}, JSON, REMARK, "date is 'May 1'"),
    (JSON, {"track": "10min_16mb"}, JSON, FAIL, "track is 10min_16mb"),
    (JSON, {"val_bpb": 5}, "scores", FAIL, "val_bpb is 5, the logs give"),
    (JSON, {"seeds": [1, 3]}, "seeds", FAIL, "has seeds 1, 3, the logs 1, 2"),
    (JSON, {"seed_results": {}}, "seeds", FAIL, "has seed_results , the logs"),
    (JSON, {"bytes_total": 5}, "bytes", FAIL, "bytes_total is 5, the largest"),
    (JSON, {"bytes_code": 1}, "bytes", FAIL, "bytes_code is 1, the script has"),
    (JSON, (r"(\"1\": {\s*.val_loss.: )[\d.]+", r"\g<1>7.5"), "scores", FAIL, "seed 1 val_loss"),
    (JSON, b"[" * 99_999, JSON, FAIL, "no JSON object"),
    ("README.md", None, "files", FAIL, "missing: README.md"),
    ("README.md", (r"^\| 2 \| 8 .*\n", ""), "README", REMARK, "of seed 2"),
    ("README.md", (r"\*\*val_bpb: \S+", "**val_bpb: 1.0"), "README", FAIL, "**val_bpb** is 1.0"),
    (LOG1, (TOTAL, r"\1: 16000000"), "bytes", FAIL, "over the cap"),
    (LOG1, (TOTAL, r"\1: 9000"), "bytes", FAIL, "is not 9,000"),
    (LOG2, (r"^(seed|  seed: |(model_params.* seed:))\d+", r"\g<1>7"), "seeds", FAIL, "of seed 7"),
    (LOG2, (r"(?s)^step:5/.*", "Traceback (most"), "seeds", FAIL, "no final score"),
    (LOG2, (r"\bval_(loss|bpb)(?=:)", r"PARTIAL_\1"), "seeds", FAIL, f"PARTIAL score in {LOG2}"),
    (LOG2, (r'"target_tokens": \d+', '"target_tokens": []'), "configuration", FAIL, "targets: "),
    (LOG2, (r"^  matrix_lr: .*", "  matrix_lr: 0.5"), "configuration", FAIL, "lr: 0.022 ("),
    ("train_seed3.log", b"\xff\xfe", "files", FAIL, "not UTF-8"),
    ("final.ptz", b"", "files", REMARK, "do not belong here: final.ptz"),
    (SCRIPT, None, "files", FAIL, "missing: train_gpt.py"),
    (SCRIPT, ("^import os$", "import os as"), "script", FAIL, SCRIPT),
    (SCRIPT, (r'b85decode\("..', 'b85decode("00'), "script", FAIL, "LZMAError"),
    (SCRIPT, (r"\Z", "#"), "bytes", FAIL, "bytes of code, the script has"),
    (SCRIPT, b"# \xff", "script", FAIL, "decode byte"),
]


def test_a_good_folder_passes_every_check(copy):
    assert problems(copy) == {}
    found = found_in(copy, "--against", copy)
    passed = {name for name, findings in found.items() if findings[0][0] == PASS}
    assert passed >= {"files", JSON, "seeds", "scores", "README", "bytes", "text", "configuration"}
    (severity, text) = found["statistics"][0]
    assert severity == UNKNOWN
    assert "0.005 nats per token, here" in text
    assert "not reached" in text
    # A log that states fewer settings contradicts none.
    change(copy / LOG2, r"^  matrix_lr: .*\n", "")
    assert problems(copy) == {}


@pytest.mark.parametrize(("name", "done", "check", "severity", "text"), WRONG)
def test_what_is_wrong_in_a_file_is_named(copy, name, done, check, severity, text):
    if done is None:
        (copy / name).unlink()
    elif isinstance(done, bytes):
        (copy / name).write_bytes(done)
    elif isinstance(done, dict):
        resubmit(copy, **done)
    else:
        change(copy / name, *done)
    assert_found(copy, check, severity, text)


def test_a_log_twice_another_script_a_name_without_a_date_and_a_rounded_score_are_named(copy):
    stated = json.loads((copy / JSON).read_text())["val_bpb"]
    for off, severity in ((1e-5, REMARK), (1e-4, FAIL)):
        resubmit(copy, val_bpb=round(stated + off, 5))
        assert [found for found, _ in problems(copy)["scores"]] == [severity]
    (copy / "train_seed3.log").write_text((copy / LOG2).read_text() + "again\n")
    (copy / SCRIPT).write_bytes(make_record.pack_script(SOURCE + b"#"))
    resubmit(copy, seeds=None, seed_results=None)
    folder = copy.rename(copy.with_name("my record"))
    assert_found(folder, "seeds", FAIL, "several logs of seed 2")
    assert_found(folder, "script", FAIL, "ran another script")
    assert (REMARK, "my record: not named YYYY-MM-DD_Name") in problems(folder)["files"]


def test_the_limits_of_the_record_track(copy, tmp_path):
    record = shutil.copytree(copy, tmp_path / "track_10min_16mb" / copy.name)
    found = problems(record)
    assert found["seeds"] == [(REMARK, "only 1, 2; it usually takes three to show p < 0.01")]
    assert "targets, the split has more" in found["text"][0][1]
    assert "the text of the validation is not the same" in found["statistics"][0][1]
    assert "time" not in found
    change(record / LOG1, r"^total_eval_time:.*", "total_eval_time:600.5s")
    (finding,) = problems(record)["time"]
    assert finding == (FAIL, f"{LOG1}: eval 600.500 s, less than 600 s are allowed")
    change(record / LOG1, r"^total_eval_time:.*", "total_eval_time:599.5s")
    # The step during which the clock runs out may end, and one in the queue: 75 s for each of 8.
    for seconds, severity in (("600.04", REMARK), ("740", REMARK), ("900", FAIL)):
        change(record / LOG1, r'"train_seconds": [\d.]+', f'"train_seconds": {seconds}')
        assert problems(record)["time"][0][0] == severity
    change(record / LOG1, r'"train_seconds": [\d.]+', '"train_seconds": 1')
    change(record / LOG1, r"^(model_params:)", r"resumed:logs/x.step00000003.npz step:3\n\1")
    assert "train_seed1.log: interrupted and resumed" in problems(record)["time"][0][1]


@pytest.mark.parametrize("split", leaderboard.SPLITS)
def test_bytes_that_the_validation_split_does_not_have_are_found(tmp_path, split):
    targets, size = leaderboard.SPLITS[split]
    loss = 2.7
    for factor, good in ((1.0, True), (1 + 1e-4, True), (1.177, False), (0.99, False)):
        bpb = loss / math.log(2) * targets / (size * factor)
        text = helpers_logs.new(targets=targets)
        text = text.replace(helpers_logs.scores(3.0), f"val_loss:{loss} val_bpb:{bpb:.8f}")
        findings = found_in(stranger(tmp_path, {"train.log": text}))["text"]
        assert [severity for severity, _ in findings] == [PASS if good else FAIL], findings
        assert good or f"{factor:.4f} times the {size:,} that {targets:,} targets" in findings[0][1]


def test_of_several_logs_of_a_seed_that_counts_which_is_submitted(tmp_path):
    logs, results = {}, {}
    for seed, loss in {1: 2.6, 2: 2.7, 3: 2.8}.items():
        first = helpers_logs.new(seed)
        again = first.replace(helpers_logs.scores(3.0), helpers_logs.scores(loss))
        logs |= {f"seed{seed}.log": first, f"again/seed{seed}.log": again}
        results[seed] = {"val_bpb": loss / helpers_logs.NATS}
    logs["seed3.log"] = logs["again/seed3.log"]  # a log that is there twice
    folder = stranger(tmp_path, logs, val_bpb=2.7 / helpers_logs.NATS, seed_results=results)
    found = problems(folder)
    assert "scores" not in found
    said = "seed{}.log: another score of this seed is submitted"
    assert found["seeds"] == [(REMARK, said.format(seed)) for seed in (1, 2)]
    resubmit(folder, seed_results=None)
    assert (FAIL, "several logs of seed 1") in problems(folder)["seeds"]


def test_what_reviewers_accepted_is_a_remark(tmp_path):
    # Two seeds, the score of the better for the mean, code that was shortened since to what is here
    # and what the logs print, a null, and another name of the paperwork.
    files = {f"seed{seed}.log": helpers_logs.old(seed, targets=50_000_000) for seed in (1, 2)}
    worse, better = helpers_logs.scores(2.07269931), helpers_logs.scores(2.0)
    files["seed2.log"] = files["seed2.log"].replace(worse, better)
    files |= {SCRIPT: helpers_logs.SOURCE, "README.md": r"**val\_bpb: 1.2500** 1.2954"}
    total = 15_815_847 + len(helpers_logs.SOURCE)
    folder = stranger(tmp_path, files, val_bpb=1.25, val_loss=None, bytes_total=total)
    (folder / JSON).rename(folder / "submission_small.json")
    found = found_in(folder)
    assert FAIL not in {severity for findings in found.values() for severity, _ in findings}, found
    for check in ("seeds", "scores", "README", "bytes", JSON):
        assert REMARK in {severity for severity, _ in found[check]}, check
    # A log that prints no code does not say that the code is this, unless it counted it packed.
    for log in ("seed1.log", "seed2.log"):
        change(folder / log, r"(?s)\A.*?={100}\n", "")
    assert FAIL in {severity for severity, _ in problems(folder)["bytes"]}
    (folder / SCRIPT).write_text("#" * 50_000)
    sizes = [severity for severity, said in problems(folder)["bytes"] if "of code" in said]
    assert sizes == [REMARK] * 2


def test_committed_records_pass_their_own_check():
    folders = [path.parent for path in (ROOT / "records").glob("track_*/*/submission.json")]
    assert folders
    for folder in folders:
        assert problems(folder) == {}, folder


def test_what_is_no_records_folder_is_refused(tmp_path):
    def run(*argv: object) -> Result:
        return run_in_process(check_record.main, {}, tmp_path, *argv)

    assert_refused(run(tmp_path / "none"), "none: no such folder")
    assert_refused(run(tmp_path), "no records folder")
    assert_refused(run(), "--help")
    assert "    python records/check_record.py " in run("--help").out


def test_welch_and_the_bar_of_the_challenge():
    row = leaderboard.Baseline("row", 1.0810, [1.0808, 1.0810, 1.0812])
    nats = 2.583  # per bit per byte, sp8192
    verdict, reached = row.compare([1.0700, 1.0702, 1.0704], nats)
    assert reached
    assert f"better by 0.01080 bits per byte, {0.0108 * nats:.5f} nats per token" in verdict
    assert f"here {0.005 / nats:.5f} bits per byte, at p < 0.01: reached" in verdict
    slightly, reached = row.compare([1.0806, 1.0808, 1.0810], nats)
    assert not reached
    assert "not reached. It is better by 0.00020 bits per byte" in slightly
    assert "It is worse by 0.00920 bits" in row.compare([1.0900, 1.0902, 1.0904], nats)[0]
    assert row.compare([1.07], nats)[1] is None
    # p < 0.01 that it is better, but by less than the bar; by more than the bar, but not surely.
    assert row.compare([1.0791, 1.0793, 1.0795], nats)[1] is False
    assert row.compare([1.0788, 1.0790, 1.0792], nats)[1] is False
    # By hand: three against three of equal spread s, t = d / (s * sqrt(2 / 3)), 4 degrees.
    t = pytest.importorskip("scipy.stats").t
    stated = float(re.search(r"p = (\S+) that it is no better", slightly)[1])
    assert stated == pytest.approx(t.cdf(-0.0002 / (0.0002 * (2 / 3) ** 0.5), 4), rel=0.05)

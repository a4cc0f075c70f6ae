"""Records folders: made from logs, packed, checked, refused.   pytest tests/test_records.py"""

import getpass
import hashlib
import importlib.util
import inspect
import json
import math
import pwd
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import check_record
import common
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


# ---- The folder


def test_the_folder_holds_what_accepted_records_hold_with_the_figures_of_the_logs(workshop):
    expected = {"README.md", "submission.json", "requirements.txt", "train_gpt.py", "training.png"}
    logs = {"train_seed1.log", "train_seed2.log"}
    assert {path.name for path in workshop.folder.iterdir()} == expected | logs
    stored = (workshop.folder / "train_seed1.log").read_bytes()
    assert stored == workshop.log(1).read_bytes()
    versions = (workshop.folder / "requirements.txt").read_text()
    assert f"torch=={train_gpt.torch.__version__.split('+')[0]}\n" in versions

    found = json.loads((workshop.folder / "submission.json").read_text())
    runs = [RunLog.read(workshop.log(seed)) for seed in (1, 2)]
    scores = [run.json_events["eval_summary"]["val_bpb"] for run in runs]
    losses = [run.json_events["eval_summary"]["val_loss"] for run in runs]
    trained = [run.json_events["train_summary"] for run in runs]
    assert found["val_bpb"] == pytest.approx(statistics.mean(scores), rel=1e-12)
    assert found["val_loss"] == pytest.approx(statistics.mean(losses), rel=1e-12)
    assert found["bytes_total"] == max(event["bytes_total"] for event in trained)
    assert found["bytes_code"] == (workshop.folder / "train_gpt.py").stat().st_size
    assert found["seeds"] == [1, 2]
    assert found["seed_results"]["2"]["val_bpb"] == scores[1]
    assert found["seed_results"]["2"]["artifact_bytes"] == trained[1]["bytes_model"]
    assert (found["author"], found["track"]) == ("A. Name", "non_record_16mb")


def test_the_readme_has_the_result_the_table_the_audit_and_the_command(workshop):
    text = (workshop.folder / "README.md").read_text()
    scores = [RunLog.read(workshop.log(seed)).score.bpb for seed in (1, 2)]
    mean, std = statistics.mean(scores), statistics.stdev(scores)
    assert f"**val_bpb: {mean:.5f}** (2-seed mean, std {std:.4f})" in text
    assert re.search(rf"^\| 2 \| 8 \| .* \| {scores[1]:.5f} \| ", text, re.M)
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


# ---- The packed script


def run_packed(script: Path, cwd: Path, env: dict, *argv: str) -> Result:
    command = [sys.executable, script, *argv]
    env = full_environment(env)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr)


def test_the_packed_script_is_the_source_and_has_the_size_that_is_counted(
    workshop, monkeypatch, copy
):
    script = (workshop.folder / "train_gpt.py").read_bytes()
    assert script.isascii()
    code = "import sys, train_gpt as t; sys.stdout.write(t.__file__ + chr(0)); sys.stdout.flush();"
    code += "sys.stdout.buffer.write(t.submission_source())"
    env = full_environment({"PYTHONPATH": str(copy)})
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=workshop.place, capture_output=True)
    unpacked, _, source = done.stdout.partition(b"\0")
    assert source == SOURCE
    assert not Path(unpacked.decode()).parent.exists(), "it goes with the process"
    assert len(script) == train_gpt.submission_bytes(train_gpt.Hyperparameters(), 0, "code")[0]
    # A checker that loads it by its path finds the sources of its functions.
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("stranger", copy / "train_gpt.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "stranger", module)
    spec.loader.exec_module(module)
    assert inspect.getsource(module.GPT) == inspect.getsource(train_gpt.GPT)
    assert f"code_sha256:{hashlib.sha256(SOURCE).hexdigest()}\n" in workshop.log(1).read_text()


@pytest.mark.slow
def test_the_packed_script_alone_trains_and_scores_to_the_figures_of_the_log(workshop, tmp_path):
    script = Path(shutil.copy(workshop.folder / "train_gpt.py", tmp_path))
    for arguments in ([], ["eval_sliding.py", "logs/again.ptz"]):
        result = run_packed(script, tmp_path, workshop.env, *arguments)
        assert result.code == 0, result
    first, again = RunLog.read(workshop.log(1)), RunLog.read(tmp_path / "logs" / "again.txt")
    assert again.score.bpb == first.score.bpb
    assert (again.bytes_code, again.bytes_model) == (first.bytes_code, first.bytes_model)
    assert again.code_hashes == first.code_hashes
    bad = run_packed(script, tmp_path, workshop.env | {"ROUTING": "zpif"})
    assert_refused(bad, "ROUTING")


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


RESUMED = r"resumed:logs/x.step00000003.npz step:3\n\1"


def test_logs_that_no_option_makes_a_record_are_refused(workshop, tmp_path):
    first, second = workshop.log(1), workshop.log(2)
    foreign = edited(second, tmp_path, (r"^code_sha256:\w+", "code_sha256:" + "0" * 64))
    assert_refused(make(tmp_path, [first, foreign]), "made by other code", "0123abc")
    recounted = edited(second, tmp_path, (r"^Code size: \d+", "Code size: 12345"))
    assert_refused(make(tmp_path, [recounted]), "counts 12,345 bytes of code", "another liblzma")
    twice = edited(first, tmp_path)
    assert_refused(make(tmp_path, [first, twice]), "several logs of one seed: [1, 1]")
    assert_refused(make(tmp_path, [tmp_path / "none.txt"]), "none.txt: no such log")
    upstream = tmp_path / "upstream.log"
    upstream.write_text(helpers_logs.new())
    assert_refused(make(tmp_path, [upstream]), "no finished run of this trainer")
    assert_refused(make(tmp_path, [workshop.log(3)]), "a PARTIAL score")
    unscored = r"(?s)^sliding evaluation of .*"
    for pattern in ("^Code size: .*", "^pre-quantization .*", r"^  \w+: .*", unscored):
        silent = edited(second, tmp_path, (pattern, ""))
        assert_refused(make(tmp_path, [silent]), "the log states no ")
    assert not (tmp_path / "records").exists()


def test_bad_arguments_are_refused_in_one_line(workshop, tmp_path):
    log = [workshop.log(1)]
    assert_refused(make(tmp_path, log, "--name", "a/b"), "--name 'a/b'")
    assert_refused(make(tmp_path, log, "--name", ".."), "--name '..'")
    assert_refused(make(tmp_path, log, "--date", "yesterday"), "--date", "yesterday")
    assert_refused(make(tmp_path, log, "--author", "\u00e9"), "--author", "one line of ASCII")
    assert_refused(make(tmp_path, log, "--blurb", "a\n## Results"), "--blurb", "one line of ASCII")
    assert_refused(make(tmp_path, []), "--logs: name one finished log per seed")
    assert_refused(make(tmp_path, log, "--track", "fast"), "--track", "--help")
    assert make(tmp_path, [], "--dry-run").code == 0
    assert not (tmp_path / "records").exists()
    assert make(tmp_path, log).code == 0
    assert_refused(make(tmp_path, log), "exists already")


def test_line_ends_of_another_system_make_no_other_code(workshop, tmp_path, monkeypatch):
    def convert(data: bytes) -> bytes:
        return data.replace(b"\n", b"\r\n")

    # A checkout with the line ends of Windows trains, and makes its record.
    windows = convert(SOURCE)
    script = make_record.pack_script(windows)
    log = edited(
        workshop.log(1),
        tmp_path,
        (r"^code_sha256:\w+", f"code_sha256:{hashlib.sha256(windows).hexdigest()}"),
        (r"^Code size: \d+", f"Code size: {len(script)}"),
    )
    log.write_bytes(convert(log.read_bytes()))
    for source in (windows, SOURCE):
        monkeypatch.setattr(make_record, "submission_source", lambda source=source: source)
        place = tmp_path / hashlib.sha256(source).hexdigest()[:4]
        place.mkdir()
        result = make(place, [log])
        assert result.code == 0, result
        assert Path(result.out.splitlines()[-1], "train_gpt.py").read_bytes() == script
        assert make(place, [workshop.log(2)], "--name", "Unix").code == 0
    loader = tmp_path / "record_loader.txt"
    loader.write_bytes(convert(make_record.LOADER.read_bytes()))
    monkeypatch.setattr(make_record, "LOADER", loader)
    assert make_record.pack_script(windows) == script


def test_a_user_without_an_entry_in_passwd_makes_records(tmp_path, monkeypatch):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KeyError):
        getpass.getuser()
    assert make(tmp_path, [], "--dry-run").code == 0
    assert run_in_process(make_record.main, {}, tmp_path, "--help").code == 0


def test_a_full_disk_leaves_no_folder(workshop, tmp_path, monkeypatch):
    def full(path, data):
        train_gpt.require(False, f"cannot write {path}: No space left on device")

    monkeypatch.setattr(make_record, "write_atomically", full)
    assert_refused(make(tmp_path, [workshop.log(1)]), "No space left on device")
    assert list((tmp_path / "records" / "track_non_record_16mb").iterdir()) == []


# ---- What check_record.py finds


def found_in(folder: Path, against: str = "") -> dict[str, list[tuple[str, str]]]:
    """Return severity and text of the findings, by check."""
    found = {}
    for name, text, severity in check_record.check(check_record.Folder.read(folder), against):
        found.setdefault(name, []).append((severity, text))
    return found


def problems(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the findings that are a remark or fail."""
    found = found_in(folder).items()
    return {name: findings for name, findings in found if findings[0][0] in (REMARK, FAIL)}


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
# What submission.json says, the check that finds it, how grave it is, and a part of what it says.
SUBMITTED = [
    ({"val_bpb": "1.08"}, JSON, FAIL, 'val_bpb is "1.08"'),
    ({"val_bpb": True}, JSON, FAIL, "val_bpb is true"),
    ({"val_bpb": 10**400}, JSON, FAIL, "val_bpb is 1000"),
    ({"val_loss": float("nan")}, JSON, FAIL, "val_loss is NaN"),
    ({"github_id": None}, JSON, REMARK, "no github_id"),
    ({"date": "May 1"}, JSON, REMARK, "date is 'May 1'"),
    ({"track": "10min_16mb"}, JSON, FAIL, "track is 10min_16mb"),
    ({"val_bpb": 4.01234}, "scores", FAIL, "val_bpb is 4.01234, the logs give"),
    ({"val_bpb": 5}, "scores", FAIL, "val_bpb is 5, the logs give"),
    ({"seeds": [1, 3]}, "seeds", FAIL, "has seeds 1, 3, the logs 1, 2"),
    ({"seed_results": {}}, "seeds", FAIL, "has seed_results , the logs"),
    ({"bytes_total": 5}, "bytes", FAIL, "bytes_total is 5, the largest"),
    ({"bytes_code": 1}, "bytes", FAIL, "bytes_code is 1, the script has"),
]
EDITED = [  # file, pattern and replacement; None makes it a file of these bytes, or none
    ("README.md", None, None, "files", FAIL, "missing: README.md"),
    (SCRIPT, None, None, "files", FAIL, "missing: train_gpt.py"),
    (JSON, None, None, JSON, FAIL, "missing, or no JSON object"),
    (JSON, None, b"[" * 99_999, JSON, FAIL, "no JSON object"),
    (LOG2, r"^(seed|  seed: |(model_params.* seed:))\d+", r"\g<1>7", "seeds", FAIL, "of seed 7"),
    (LOG2, r"(?s)^step:5/.*", "Traceback (most recent", "seeds", FAIL, "no final score"),
    (LOG2, r"\bval_(loss|bpb)(?=:)", r"PARTIAL_\1", "seeds", FAIL, f"PARTIAL score in {LOG2}"),
    ("train_seed3.log", None, b"\xff\xfe", "files", FAIL, "not UTF-8"),
    (LOG2, r'"target_tokens": \d+', '"target_tokens": []', "configuration", FAIL, "targets: "),
    ("README.md", r"^\| 2 \| 8 .*\n", "", "README", REMARK, "of seed 2"),
    ("README.md", r"\*\*val_bpb: \S+", "**val_bpb: 1.0", "README", FAIL, "**val_bpb** is 1.0"),
    (JSON, r"(\"1\": {\s*.val_loss.: )[\d.]+", r"\g<1>7.5", "scores", FAIL, "seed 1 val_loss"),
    (LOG1, TOTAL, r"\1: 16000000", "bytes", FAIL, "over the cap"),
    (LOG1, TOTAL, r"\1: 9000", "bytes", FAIL, "is not 9,000"),
    (LOG2, r"^  matrix_lr: .*", "  matrix_lr: 0.5", "configuration", FAIL, "matrix_lr: 0.022 ("),
    ("final.ptz", None, b"", "files", REMARK, "do not belong here: final.ptz"),
    (SCRIPT, "^import os$", "import os as", "script", FAIL, SCRIPT),
    (SCRIPT, r'b85decode\("..', 'b85decode("00', "script", FAIL, "LZMAError"),
    (SCRIPT, r"\Z", "#", "bytes", FAIL, "bytes of code, the script has"),
    (SCRIPT, None, b"# \xff", "script", FAIL, "decode byte"),
]


def assert_found(folder: Path, check: str, severity: str, text: str) -> None:
    found = problems(folder)
    assert any(s == severity and text in said for s, said in found.get(check, [])), found
    # What is only in the paperwork touches no other check.
    if check in (JSON, "scores") or severity == REMARK:
        assert set(found) <= {check, "files"}, found


def test_a_good_folder_passes_every_check(copy):
    assert problems(copy) == {}
    found = found_in(copy, str(copy))
    passed = {name for name, findings in found.items() if findings[0][0] == PASS}
    assert passed >= {"files", JSON, "seeds", "scores", "README", "bytes", "text", "configuration"}
    (severity, text) = found["statistics"][0]
    assert severity == UNKNOWN
    assert "0.005 nats per token, here" in text
    assert "not reached" in text


@pytest.mark.parametrize(("fields", "check", "severity", "text"), SUBMITTED)
def test_what_is_wrong_in_a_submission_is_named(copy, fields, check, severity, text):
    resubmit(copy, **fields)
    assert_found(copy, check, severity, text)


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "check", "severity", "text"),
    EDITED,
    ids=[f"{case[0]} {case[-1]}" for case in EDITED],
)
def test_what_is_wrong_in_a_file_is_named(copy, name, pattern, replacement, check, severity, text):
    if pattern is not None:
        change(copy / name, pattern, replacement)
    elif replacement is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(replacement)
    assert_found(copy, check, severity, text)


def test_a_log_twice_and_another_script_and_a_name_without_a_date_are_named(copy):
    (copy / "train_seed3.log").write_text((copy / LOG2).read_text() + "again\n")
    (copy / SCRIPT).write_bytes(make_record.pack_script(SOURCE + b"#"))
    resubmit(copy, seeds=None, seed_results=None)
    folder = copy.rename(copy.with_name("my record"))
    assert_found(folder, "seeds", FAIL, "several logs of seed 2")
    assert_found(folder, "script", FAIL, "ran another script")
    assert (REMARK, "my record: not named YYYY-MM-DD_Name") in problems(folder)["files"]


@pytest.mark.parametrize(("off", "severity"), [(1e-5, REMARK), (1e-4, FAIL)])
def test_the_rounding_of_a_fifth_decimal_is_a_remark(copy, off, severity):
    stated = json.loads((copy / JSON).read_text())["val_bpb"]
    resubmit(copy, val_bpb=round(stated + off, 5))
    assert [found for found, _ in problems(copy)["scores"]] == [severity]


def test_the_limits_of_the_record_track(copy, tmp_path):
    record = shutil.copytree(copy, tmp_path / "track_10min_16mb" / copy.name)
    found = problems(record)
    assert found["seeds"] == [(REMARK, "only 1, 2; it usually takes three to show p < 0.01")]
    assert "targets, the split has more" in found["text"][0][1]
    assert "the text of the validation is not the same" in found["statistics"][0][1]
    assert "time" not in found
    change(record / LOG1, r"^total_eval_time:.*", "total_eval_time:600.5s")
    assert problems(record)["time"][0][0] == FAIL
    assert "eval 600.500 s, less than 600 s are allowed" in problems(record)["time"][0][1]
    change(record / LOG1, r"^total_eval_time:.*", "total_eval_time:599.5s")
    # The step during which the clock runs out may end, and one in the queue: 75 s for each of 8.
    for seconds, severity in (("600.04", REMARK), ("740", REMARK), ("900", FAIL)):
        change(record / LOG1, r'"train_seconds": [\d.]+', f'"train_seconds": {seconds}')
        assert problems(record)["time"][0][0] == severity
    change(record / LOG1, r'"train_seconds": [\d.]+', '"train_seconds": 1')
    change(record / LOG1, r"^(model_params:)", RESUMED)
    assert "train_seed1.log: interrupted and resumed" in problems(record)["time"][0][1]


@pytest.mark.parametrize("dialect", ["old", "new"])
def test_a_folder_of_a_stranger_is_checked_by_its_own_dialect(tmp_path, dialect):
    write = {"old": helpers_logs.old, "new": helpers_logs.new}[dialect]
    folder = stranger(tmp_path, {"train.log": write(targets=50_000_000)})
    run = RunLog.read(folder / "train.log")
    (folder / SCRIPT).write_text("#" * (run.bytes_code + 1))
    (folder / "README.md").write_text(f"# S\n\n**val_bpb: {run.score.bpb:.4f}**\n")
    fields = dict.fromkeys(("author", "github_id", "name", "blurb"), "x")
    fields |= {"date": "2026-04-05T00:00:00Z", "val_bpb": run.score.bpb}
    fields |= {"val_loss": run.score.loss, "bytes_total": run.bytes_total}
    resubmit(folder, **fields)
    # It may have counted its code packed; the old dialect prints the script, which is another.
    found = problems(folder)
    assert [severity for severity, _ in found.pop("bytes")] == [REMARK]
    assert set(found) <= {"script", "seeds"}
    (folder / "README.md").write_text("# S\n\n**val_bpb: 1.2345**\n")
    severities = [severity for severity, _ in problems(folder)["README"]]
    assert severities == [REMARK, FAIL]


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
    def scored(seed: int, loss: float) -> str:
        log = helpers_logs.new(seed).replace("_lr: 0.022", f"_lr: {0.03 if loss > 3 else 0.022}")
        return log.replace(helpers_logs.scores(3.0), helpers_logs.scores(loss))

    # Two trained models that were scored again, and a log that is there twice.
    losses = {1: 2.6, 2: 2.7, 3: 2.8}
    logs = {f"again/seed{seed}.log": scored(seed, loss) for seed, loss in losses.items()}
    logs |= {"seed1.log": scored(1, 3.1), "seed2.log": scored(2, 3.2), "seed3.log": scored(3, 2.8)}
    results = {seed: {"val_bpb": loss / helpers_logs.NATS} for seed, loss in losses.items()}
    folder = stranger(tmp_path, logs, val_bpb=2.7 / helpers_logs.NATS, seed_results=results)
    found = problems(folder)
    assert not {"scores", "configuration"} & set(found)
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
    # A log that prints no code does not say that the code is this.
    change(folder / "seed1.log", r"(?s)\A.*?={100}\n", "")
    assert FAIL in {severity for severity, _ in problems(folder)["bytes"]}


def test_a_log_that_states_fewer_settings_contradicts_none(copy):
    change(copy / LOG2, r"^  matrix_lr: .*\n", "")
    assert "configuration" not in problems(copy)


def test_a_mean_of_bytes_is_a_remark(copy):
    totals = [RunLog.read(copy / log).bytes_total for log in (LOG1, LOG2)]
    assert totals[0] != totals[1]
    resubmit(copy, bytes_total=round(statistics.mean(totals)))
    assert [severity for severity, _ in problems(copy)["bytes"]] == [REMARK]


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
    for tool in (make_record, check_record):
        result = run_in_process(tool.main, {}, tmp_path, "--help")
        assert f"    python records/{tool.__name__}.py " in result.out


def test_the_command_line_prints_the_table_and_says_by_its_status_whether_all_holds(copy, tmp_path):
    good = run_in_process(check_record.main, {}, tmp_path, copy)
    assert (good.code, good.err) == (0, ""), good
    lines = good.out.splitlines()
    assert lines[:2] == ["| check | finding | result |", "|---|---|---|"]
    assert all(line.startswith("| ") and line.endswith((" pass |", " - |")) for line in lines[2:])
    resubmit(copy, val_bpb=1.0)
    bad = run_in_process(check_record.main, {}, tmp_path, copy)
    assert bad.code == 1
    assert "| scores | val_bpb is 1.0, the logs give" in bad.out


# ---- Statistics and the common module


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
    worse = row.compare([1.0900, 1.0902, 1.0904], nats)[0]
    assert "not reached. It is worse by 0.00920 bits per byte" in worse
    assert row.compare([1.07], nats)[1] is None
    # p < 0.01 that it is better, but by less than the bar; by more than the bar, but not surely.
    assert row.compare([1.0791, 1.0793, 1.0795], nats)[1] is False
    assert row.compare([1.03, 1.07, 1.11], nats)[1] is False
    # By hand: three against three of equal spread s, t = d / (s * sqrt(2 / 3)), 4 degrees.
    t = pytest.importorskip("scipy.stats").t
    stated = float(re.search(r"p = (\S+) that it is no better", slightly)[1])
    assert stated == pytest.approx(t.cdf(-0.0002 / (0.0002 * (2 / 3) ** 0.5), 4), rel=0.05)


def test_rows_and_logs_are_compared_with_runs_of_the_same_text_only(workshop):
    run = RunLog.read(workshop.log(1))
    text = re.sub(r'"target_tokens": \d+', '"target_tokens": 40540160', run.text)
    challenge = replace(run, text=text)
    row = leaderboard.find_baseline("1394")
    logs = leaderboard.find_baseline(str(workshop.log(2)))
    assert (row.same_text(challenge), row.same_text(run)) == (True, False)
    assert (logs.same_text(challenge), logs.same_text(run)) == (False, True)
    folder = leaderboard.find_baseline(str(workshop.folder))
    scores = [RunLog.read(workshop.log(seed)).score.bpb for seed in (1, 2)]
    assert sorted(folder.seeds) == sorted(scores)


def test_the_common_module():
    smoke, cpu = common.profile("smoke"), common.profile("cpu")
    assert smoke["NUM_LAYERS"] == "2"
    assert int(cpu["MODEL_DIM"]) > int(smoke["MODEL_DIM"])
    with pytest.raises(Exception, match="PROFILE=large: expected record"):
        common.profile("large")
    assert common.markdown_table(["a", "b"], [[1, "x"]]) == "| a | b |\n|---|---|\n| 1 | x |"
    assert common.last_match(r"^n:(\d+)", "n:1\nn:2\n", int) == 2
    assert common.last_match(r"^m:(\d+)", "n:1\n") is None
    with pytest.raises(Exception, match="needs no_such_package: pip install"):
        common.optional("no_such_package.part")

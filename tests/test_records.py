"""Records folders: made from logs, packed, checked, refused.   python -m pytest tests/test_records.py"""

import hashlib
import importlib.util
import inspect
import json
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import check_record
import helpers_logs
import leaderboard
import make_record
import pytest
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
from runlog import Run

import eval_sliding
import train_gpt

SOURCE = train_gpt.submission_source()


@dataclass(frozen=True)
class Workshop:
    """A data set, the finished logs of seeds 1 and 2 and the PARTIAL one of seed 3, and a good folder made of two."""

    place: Path
    env: dict[str, str]
    folder: Path

    def log(self, seed: int) -> Path:
        return self.place / "logs" / f"s{seed}.txt"


def make(tmp_path: Path, logs: list[Path], *arguments: object, picture: bool = False) -> Result:
    """make_record.py as on the command line; a picture takes a second that most tests can do without."""
    find = importlib.util.find_spec if picture else lambda name: None
    argv = [
        "--name",
        "Tiny",
        "--author",
        "A. Name",
        "--date",
        "2026-11-24",
        "--output",
        tmp_path / "records",
    ]
    with mock.patch("make_record.importlib.util.find_spec", find):
        return run_in_process(make_record.main, {}, tmp_path, *argv, *arguments, "--logs", *logs)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    place = tmp_path_factory.mktemp("workshop")
    data = write_dataset(place / "data")
    for seed, more in {1: {}, 2: {}, 3: {"VAL_MAX_TOKENS": 100}}.items():
        env = cli_env(data, SEED=seed, RUN_ID=f"s{seed}", **more)
        artifact = place / "logs" / f"s{seed}.ptz"
        assert run_in_process(train_gpt.main, env, place).code == 0
        assert run_in_process(eval_sliding.main, eval_env(data, **more), place, artifact).code == 0
        if seed == 1:
            assert (
                run_in_process(eval_sliding.main, eval_env(data), place, "--audit", artifact).code
                == 0
            )
        change(artifact.with_suffix(".txt"), r"commit:(\w+(-dirty)?)$", "commit:0123abc")
    result = make(place, [place / "logs" / f"s{seed}.txt" for seed in (2, 1)], picture=True)
    assert result.code == 0, result
    folder = Path(result.out.splitlines()[-1])
    assert folder == place / "records" / "track_non_record_16mb" / "2026-11-24_Tiny"
    return Workshop(place, cli_env(data, SEED=1, RUN_ID="again"), folder)


# ---- The folder


def test_the_folder_holds_what_accepted_records_hold(workshop):
    names = {path.name for path in workshop.folder.iterdir()}
    logs = {"train_seed1.log", "train_seed2.log"}
    assert (
        names - {"training.png"}
        == {"README.md", "submission.json", "requirements.txt", "train_gpt.py"} | logs
    )
    assert ("training.png" in names) == bool(importlib.util.find_spec("matplotlib"))
    for seed in (1, 2):
        assert (workshop.folder / f"train_seed{seed}.log").read_bytes() == workshop.log(
            seed
        ).read_bytes()
    versions = (workshop.folder / "requirements.txt").read_text()
    assert f"torch=={train_gpt.torch.__version__.split('+')[0]}\n" in versions
    assert re.search(r"^zstandard==\S+\n", versions, re.M)


def test_every_figure_of_the_submission_is_that_of_the_logs(workshop):
    found = json.loads((workshop.folder / "submission.json").read_text())
    runs = [Run.read(workshop.log(seed)) for seed in (1, 2)]
    scores = [run.json_events["eval_summary"]["val_bpb"] for run in runs]
    losses = [run.json_events["eval_summary"]["val_loss"] for run in runs]
    trained = [run.json_events["train_summary"] for run in runs]
    assert found["val_bpb"] == pytest.approx(statistics.mean(scores), rel=1e-12)
    assert found["val_loss"] == pytest.approx(statistics.mean(losses), rel=1e-12)
    assert found["val_bpb_std"] == pytest.approx(statistics.stdev(scores), rel=1e-12)
    assert found["bytes_total"] == max(event["bytes_total"] for event in trained)
    assert found["bytes_code"] == (workshop.folder / "train_gpt.py").stat().st_size
    assert found["seeds"] == [1, 2]
    assert found["seed_results"]["2"]["val_bpb"] == scores[1]
    assert found["seed_results"]["2"]["artifact_bytes"] == trained[1]["bytes_model"]
    assert found["compliance"]["artifact_under_16mb"] is True
    assert found["compliance"]["three_seeds"] is False
    assert (found["author"], found["track"], found["date"]) == (
        "A. Name",
        "non_record_16mb",
        "2026-11-24",
    )


def test_the_readme_has_the_result_the_table_the_audit_and_the_command(workshop):
    text = (workshop.folder / "README.md").read_text()
    scores = [Run.read(workshop.log(seed)).score.bpb for seed in (1, 2)]
    assert (
        f"**val_bpb: {statistics.mean(scores):.5f}** (2-seed mean, std {statistics.stdev(scores):.4f})"
        in text
    )
    assert re.search(rf"^\| 2 \| 8 \| .* \| {scores[1]:.5f} \| ", text, re.M)
    assert len(re.findall(r"^\| C[1-4] .* \| pass \|$", text, re.M)) == 4
    assert "EVAL_STRIDE=8" in text
    assert re.search(r"^export OMP_NUM_THREADS=\d+ ", text, re.M), (
        "the rounding of sums depends on it"
    )
    assert "for SEED in 1 2; do" in text
    assert "## Exceptions" not in text
    assert all(
        re.search(rf"^## {title}$", text, re.M)
        for title in ("Architecture", "Compliance", "Credits", "Files")
    )


def test_the_previous_row_is_compared_in_both_units(workshop, tmp_path):
    logs = [workshop.log(1), workshop.log(2)]
    result = make(tmp_path, logs, "--previous", *logs)
    assert result.code == 0, result
    text = Path(result.out.splitlines()[-1], "README.md").read_text()
    assert "| difference | +0.00000 | +0.00000 |" in text
    assert "Welch, one-sided: p = 0.5 that it is no better" in text
    assert_refused(
        make(tmp_path, logs, "--previous", "1394", "--name", "Other"),
        "1394: validated on another text",
    )
    assert_refused(
        make(tmp_path, logs, "--previous", "9999", "--name", "Other"), "9999: no such row", "1394"
    )


# ---- The packed script


def test_the_packed_script_unpacks_to_the_source_byte_for_byte_and_has_the_size_that_is_counted(
    workshop,
):
    script = (workshop.folder / "train_gpt.py").read_bytes()
    assert script == make_record.pack_script(SOURCE)
    assert script.isascii()
    code = "import json, sys, train_gpt as t; source = t.submission_source().decode(); "
    code += "json.dump([t.__file__, t.GPT.__module__, source], sys.stdout)"
    env = full_environment({"PYTHONPATH": str(workshop.folder)})
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=workshop.place, capture_output=True, text=True
    )
    unpacked, module, source = json.loads(done.stdout)
    assert module == "train_gpt"
    assert source.encode() == SOURCE
    assert (ROOT / "train_gpt.py").read_bytes() + b"\0" + (
        ROOT / "eval_sliding.py"
    ).read_bytes() == SOURCE
    assert not Path(unpacked).parent.exists(), "it goes with the process"
    assert len(script) == train_gpt.submission_bytes(train_gpt.Hyperparameters(), 0, "code")[0]
    assert f"code_sha256:{hashlib.sha256(SOURCE).hexdigest()}\n" in workshop.log(1).read_text()


def test_a_checker_that_loads_the_packed_script_by_its_path_finds_sources(workshop, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("stranger", workshop.folder / "train_gpt.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "stranger", module)
    spec.loader.exec_module(module)
    assert module.Hyperparameters.model_dim == train_gpt.Hyperparameters.model_dim
    assert inspect.getsource(module.train_step) == inspect.getsource(train_gpt.train_step)
    assert inspect.getsource(module.GPT) == inspect.getsource(train_gpt.GPT)


def test_the_packed_script_alone_trains_and_scores_to_the_figures_of_the_log(workshop, tmp_path):
    shutil.copy(workshop.folder / "train_gpt.py", tmp_path)
    for arguments in ([], ["eval_sliding.py", "logs/again.ptz"]):
        command = [sys.executable, "train_gpt.py", *arguments]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=full_environment(workshop.env),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    first, again = (Run.read(path) for path in (workshop.log(1), tmp_path / "logs" / "again.txt"))
    assert again.score.bpb == first.score.bpb
    assert (again.bytes_code, again.bytes_model) == (first.bytes_code, first.bytes_model)
    assert again.code_hashes == first.code_hashes
    assert again.source.encode() == (ROOT / "train_gpt.py").read_bytes()


def test_the_packed_script_ends_in_one_line_for_bad_input(workshop, tmp_path):
    command = [sys.executable, workshop.folder / "train_gpt.py"]
    for arguments, env in (([], {"ROUTING": "zpif"}), (["eval_sliding.py", "nowhere.ptz"], {})):
        environment = full_environment(workshop.env | env)
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert_refused(Result(done.returncode, done.stdout, done.stderr))


# ---- What make_record.py refuses


def edited(log: Path, tmp_path: Path, *changes: tuple[str, str]) -> Path:
    """A copy of a log with every pattern replaced, each of which has to occur."""
    text = log.read_text()
    for pattern, replacement in changes:
        assert re.search(pattern, text, re.M), pattern
        text = re.sub(pattern, replacement, text, flags=re.M)
    copy = tmp_path / f"edited_{log.name}"
    copy.write_text(text)
    return copy


REFUSED = {
    "mixed": [(r"^  matrix_lr: .*", "  matrix_lr: 0.5")],
    "unscored": [(r"(?s)^sliding evaluation of .*", "")],
    "cap": [(r"^Total submission size (\S+): \d+", r"Total submission size \1: 16000000")],
    "commit": [("commit:0123abc", "commit:0123abc-dirty")],
}


@pytest.mark.parametrize("name", [*REFUSED, "several", "partial"])
def test_what_a_reviewer_would_reject_is_refused_and_an_exception_is_stated(
    workshop, tmp_path, name
):
    changes = REFUSED.get(name, [("commit:0123abc", "commit:4567def")])
    logs = [workshop.log(1), edited(workshop.log(2), tmp_path, *changes)]
    logs = {"partial": [workshop.log(3)], "unscored": logs[1:]}.get(name, logs)
    allow = f"--allow-{'commit' if name == 'several' else name}"
    result = make(tmp_path, logs)
    assert_refused(
        result, allow, "matrix_lr: 0.022 (s1.txt), 0.5 (edited_s2.txt)" if name == "mixed" else ""
    )
    assert not (tmp_path / "records").exists()
    made = make(tmp_path, logs, allow)
    assert made.code == 0, made
    text = Path(made.out.splitlines()[-1], "README.md").read_text()
    reason = result.err.removeprefix("error: ").split(" (--allow")[0]
    assert f"- {reason}\n" in text.split("## Exceptions")[1]


def test_a_partial_score_is_never_called_val_bpb(workshop, tmp_path):
    folder = Path(make(tmp_path, [workshop.log(3)], "--allow-partial").out.splitlines()[-1])
    assert "val_bpb" not in (folder / "README.md").read_text()
    assert "**PARTIAL_bpb: " in (folder / "README.md").read_text()
    found = json.loads((folder / "submission.json").read_text())
    assert found["val_bpb"] is None
    assert found["seed_results"]["3"]["val_bpb"] is None


@pytest.mark.parametrize(
    ("pattern", "replacement", "what"),
    [
        (r'"train_seconds": [\d.]+', '"train_seconds": 600.0', "training took 600.000 s"),
        (r"^total_eval_time:.*", "total_eval_time:600.1s", "evaluation took 600.100 s"),
        (
            r"^(warmup_step:)",
            r"resumed:logs/x.step00000003.npz step:3\n\1",
            "the training was interrupted and resumed",
        ),
    ],
)
def test_the_record_track_has_its_600_seconds(workshop, tmp_path, pattern, replacement, what):
    logs = [edited(workshop.log(1), tmp_path, (pattern, replacement))]
    assert make(tmp_path, logs).code == 0
    text = (
        r"tokens:\d+|\"target_tokens\": \d+",
        lambda found: re.sub(r"\d+", "40540160", found[0]),
    )
    log = edited(logs[0], tmp_path, text)
    assert_refused(make(tmp_path, [log], "--track", "10min_16mb"), what, "--allow-time")
    assert make(tmp_path, [log], "--track", "10min_16mb", "--allow-time").code == 0


def test_logs_that_no_option_makes_a_record_are_refused(workshop, tmp_path):
    first, second = workshop.log(1), workshop.log(2)
    foreign = edited(second, tmp_path, (r"^code_sha256:\w+", "code_sha256:" + "0" * 64))
    assert_refused(make(tmp_path, [first, foreign]), "made by other code", "commit 0123abc")
    recounted = edited(second, tmp_path, (r"^Code size: \d+", "Code size: 12345"))
    assert_refused(make(tmp_path, [recounted]), "counts 12,345 bytes of code", "another liblzma")
    twice = edited(first, tmp_path)
    assert_refused(make(tmp_path, [first, twice]), "several logs of one seed: [1, 1]")
    assert_refused(make(tmp_path, [tmp_path / "none.txt"]), "none.txt: no such log")
    upstream = tmp_path / "upstream.log"
    upstream.write_text(helpers_logs.new())
    assert_refused(make(tmp_path, [upstream]), "no finished run of this trainer")
    for pattern in ("^Code size: .*", "^model_params:.*", "^pre-quantization .*", r"^  \w+: .*"):
        assert_refused(
            make(tmp_path, [edited(second, tmp_path, (pattern, ""))]), "the log states no "
        )
    crashed = edited(first, tmp_path, (r"(?s)^step:5/.*", "Traceback (most recent call last):\n"))
    assert_refused(make(tmp_path, [crashed]), "no finished run of this trainer")
    assert not (tmp_path / "records").exists()


def test_bad_arguments_are_refused_in_one_line(workshop, tmp_path):
    log = [workshop.log(1)]
    assert_refused(make(tmp_path, log, "--name", "a/b"), "--name 'a/b'")
    assert_refused(
        make(tmp_path, log, "--date", "yesterday"), "--date yesterday: expected YYYY-MM-DD"
    )
    assert_refused(make(tmp_path, log, "--name", ".."), "--name '..'")
    assert_refused(
        make(tmp_path, log, "--date", "20261124"), "--date 20261124: expected YYYY-MM-DD"
    )
    assert_refused(make(tmp_path, log, "--author", "\u00e9"), "one line of ASCII")
    assert_refused(make(tmp_path, log, "--blurb", "a\n## Results"), "--blurb", "one line of ASCII")
    assert_refused(make(tmp_path, log, "--blurb", ""), "--blurb")
    assert_refused(make(tmp_path, [], "--author", "x"), "--logs: name one finished log per seed")
    assert make(tmp_path, [], "--dry-run").code == 0
    assert not (tmp_path / "records").exists()
    assert_refused(make(tmp_path, log, "--track", "fast"), "--track", "--help")
    assert make(tmp_path, log).code == 0
    assert_refused(make(tmp_path, log), "exists already")
    assert sorted(p.name for p in (tmp_path / "records" / "track_non_record_16mb").iterdir()) == [
        "2026-11-24_Tiny"
    ]


def test_a_full_disk_leaves_no_folder(workshop, tmp_path, monkeypatch):
    def full(path, data):
        raise train_gpt.Refusal(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(make_record, "write_atomically", full)
    assert_refused(make(tmp_path, [workshop.log(1)]), "No space left on device")
    assert list((tmp_path / "records" / "track_non_record_16mb").iterdir()) == []


# ---- What check_record.py finds


def verdicts(folder: Path, *against: str) -> dict[str, tuple[bool | None, str]]:
    found = check_record.check(check_record.Folder.read(folder), list(against), run=False)
    assert len({finding.check for finding in found}) == len(found)
    return {finding.check: (finding.holds, finding.text) for finding in found}


def failed(folder: Path) -> dict[str, str]:
    return {name: text for name, (holds, text) in verdicts(folder).items() if holds is False}


@pytest.fixture
def copy(workshop, tmp_path) -> Path:
    folder = tmp_path / "track_non_record_16mb" / workshop.folder.name
    shutil.copytree(workshop.folder, folder)
    return folder


def change(path: Path, pattern: str, replacement: str) -> None:
    text = path.read_text()
    assert re.search(pattern, text, re.M), pattern
    path.write_text(re.sub(pattern, replacement, text, flags=re.M))


def resubmit(folder: Path, **fields: object) -> None:
    path = folder / "submission.json"
    path.write_text(
        json.dumps(
            {k: v for k, v in (json.loads(path.read_text()) | fields).items() if v != "absent"}
        )
    )


def test_a_good_folder_passes_every_check(copy):
    assert failed(copy) == {}
    assert {name for name, (holds, _) in verdicts(copy).items() if holds} >= {
        "files",
        "scores",
        "README",
        "bytes",
    }


FAULTS = {
    "no README": (
        lambda d: (d / "README.md").unlink(),
        {"files": "missing: README.md", "README": "no table"},
    ),
    "no script": (lambda d: (d / "train_gpt.py").unlink(), {"files": "missing: train_gpt.py"}),
    "no submission": (
        lambda d: (d / "submission.json").unlink(),
        {"files": "missing: submission.json", "submission.json": "missing"},
    ),
    "broken JSON": (
        lambda d: change(d / "submission.json", r"\A\{", ""),
        {"submission.json": "no JSON object"},
    ),
    "a number as text": (
        lambda d: resubmit(d, val_bpb="1.08"),
        {"submission.json": 'val_bpb is "1.08"'},
    ),
    "a key missing": (
        lambda d: resubmit(d, github_id="absent"),
        {"submission.json": "no github_id"},
    ),
    "NaN": (lambda d: resubmit(d, val_loss=float("nan")), {"submission.json": "val_loss is nan"}),
    "another mean": (
        lambda d: resubmit(d, val_bpb=4.01234),
        {"scores": "val_bpb is 4.01234, the logs give"},
    ),
    "another spread": (lambda d: resubmit(d, val_bpb_std=0.5), {"scores": "val_bpb_std is 0.5"}),
    "another seed": (
        lambda d: resubmit(d, seeds=[1, 3]),
        {"seeds": "submission.json has seeds 1, 3, the logs 1, 2"},
    ),
    "few digits": (lambda d: resubmit(d, val_bpb=5), {"scores": "val_bpb is 5, the logs give"}),
    "true for a number": (
        lambda d: resubmit(d, val_bpb=True),
        {"submission.json": "val_bpb is true"},
    ),
    "a huge number": (
        lambda d: resubmit(d, val_bpb=10**400),
        {"submission.json": "val_bpb is 1000"},
    ),
    "nested lists": (
        lambda d: (d / "submission.json").write_text("[" * 99_999),
        {"submission.json": "no JSON object"},
    ),
    "another track": (
        lambda d: resubmit(d, track="10min_16mb"),
        {"submission.json": "track is 10min_16mb"},
    ),
    "other times": (
        lambda d: resubmit(d, wallclock_seconds=1.5, eval_time_seconds=0.01, step_stop=99),
        {"scores": "step_stop is 99, the logs give 8.0; wallclock_seconds is 1.5"},
    ),
    "other sizes": (
        lambda d: resubmit(d, bytes_model=1),
        {"scores": "bytes_model is 1, the logs give"},
    ),
    "another code": (
        lambda d: resubmit(d, bytes_code=1),
        {"bytes": "bytes_code is 1, train_gpt.py has"},
    ),
    "another float": (
        lambda d: resubmit(d, pre_quant_val_bpb=0.5),
        {"scores": "pre_quant_val_bpb is 0.5"},
    ),
    "another torch": (
        lambda d: resubmit(d, pytorch_version="1.0"),
        {"scores": "pytorch_version is 1.0"},
    ),
    "a result missing": (
        lambda d: resubmit(d, seed_results={}),
        {"seeds": "submission.json has seed_results , the logs 1, 2"},
    ),
    "another time of a seed": (
        lambda d: change(d / "submission.json", r'"train_time_s": [\d.]+', '"train_time_s": 77.5'),
        {"scores": "seed 1 train_time_s is 77.5"},
    ),
    "a row missing": (
        lambda d: change(d / "README.md", r"^\| 2 \| 8 .*\n", ""),
        {"README": "no row for seed 2"},
    ),
    "the spread in the headline": (
        lambda d: change(d / "README.md", r"mean, std \S+\)", "mean, std 9.9999)"),
        {"README": "std 9.9999 is not that of the logs"},
    ),
    "a log of another seed": (
        lambda d: (d / "train_seed1.log").rename(d / "train_seed9.log"),
        {"seeds": "train_seed9.log is the log of seed 1"},
    ),
    "a binary log": (
        lambda d: (d / "train_seed3.log").write_bytes(b"\xff\xfe"),
        {"files": "not UTF-8"},
    ),
    "a mad log": (
        lambda d: change(d / "train_seed2.log", r'"target_tokens": \d+', '"target_tokens": []'),
        {"configuration": "cannot be read: TypeError"},
    ),
    "another total": (
        lambda d: resubmit(d, bytes_total=5),
        {"bytes": "bytes_total is 5, the largest in the logs"},
    ),
    "a cell of the README": (
        lambda d: change(d / "README.md", r"^(\| 2 \| 8 .*?)\d\.\d{5} ", r"\g<1>9.99999 "),
        {"README": "seed 2: 9.99999 is not what the logs give"},
    ),
    "the mean in the README": (
        lambda d: change(d / "README.md", r"^(\| \*\*Mean.*?)\d\.\d{5} ", r"\g<1>9.99999 "),
        {"README": "Mean: 9.99999 is not what the logs give"},
    ),
    "the headline": (
        lambda d: change(d / "README.md", r"\*\*val_bpb: \S+\*\*", "**val_bpb: 1.00000**"),
        {"README": "**val_bpb: 1.00000** is not the mean"},
    ),
    "a longer script": (
        lambda d: (d / "train_gpt.py").write_bytes((d / "train_gpt.py").read_bytes() + b"#"),
        {"bytes": "bytes of code, train_gpt.py has"},
    ),
    "over the cap": (
        lambda d: change(d / "train_seed1.log", r"^(Total submission .*): \d+", r"\1: 16000000"),
        {"bytes": "is not 16,000,000; train_seed1.log: 16,000,000 bytes, over the cap"},
    ),
    "two configurations": (
        lambda d: change(d / "train_seed2.log", r"^  matrix_lr: .*", "  matrix_lr: 0.5"),
        {"configuration": "matrix_lr: 0.022 (train_seed1.log), 0.5 (train_seed2.log)"},
    ),
    "leaky data": (
        lambda d: [
            change(d / f"train_seed{s}.log", r"train_shards:\d+", "train_shards:1499")
            for s in (1, 2)
        ],
        {"configuration": "train_shards 1499"},
    ),
    "one seed twice": (
        lambda d: (d / "train_seed3.log").write_text(
            (d / "train_seed2.log").read_text() + "again\n"
        ),
        {"seeds": "several logs of seed 2", "scores": "val_bpb is"},
    ),
    "a crash": (
        lambda d: change(
            d / "train_seed2.log", r"(?s)^step:5/.*", "Traceback (most recent call last):\n"
        ),
        {"seeds": "no final score in train_seed2.log", "bytes": "train_seed2.log states no total"},
    ),
    "a PARTIAL score": (
        lambda d: change(d / "train_seed2.log", r"\bval_(loss|bpb)(?=:)", r"PARTIAL_\1"),
        {"seeds": "PARTIAL score in train_seed2.log"},
    ),
    "a model": (
        lambda d: (d / "final.ptz").write_bytes(b""),
        {"files": "do not belong here: final.ptz"},
    ),
    "data": (
        lambda d: (d / "fineweb_val_000000.bin").write_bytes(b""),
        {"files": "here: fineweb_val_000000.bin"},
    ),
    "a syntax error": (
        lambda d: change(d / "train_gpt.py", "^import os$", "import os as"),
        {"syntax": "train_gpt.py"},
    ),
    "no UTF-8": (
        lambda d: (d / "train_gpt.py").write_bytes(b"# \xff"),
        {"syntax": "can't decode byte"},
    ),
    "a bad name": (lambda d: d.rename(d.with_name("my record")), {"name": "my record"}),
}


CONFINED = set(FAULTS) - {
    "no script",
    "no submission",
    "a crash",
    "over the cap",
    "a PARTIAL score",
    "one seed twice",
}
CONFINED -= {"nested lists", "a mad log"}
CONFINED -= {"a syntax error", "no UTF-8"}  # these change the script's size as well


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(copy, fault):
    plant, expected = FAULTS[fault]
    plant(copy)
    folder = copy if copy.exists() else copy.with_name("my record")
    found = failed(folder)
    for check, text in expected.items():
        assert text in found.get(check, "passed"), found
    if fault in CONFINED:
        assert set(found) == set(expected), found


def test_the_limits_of_the_record_track(copy, tmp_path):
    record = tmp_path / "track_10min_16mb" / copy.name
    shutil.copytree(copy, record)
    found = failed(record)
    assert "a record needs three" in found["seeds"]
    assert "targets, the split has more" in found["validation"]
    assert "validated on another text" in found["statistics"]
    assert "time" not in found
    change(record / "train_seed1.log", r"^total_eval_time:.*", "total_eval_time:600.5s")
    assert "eval 600.500 s at most, less than 600 s each allowed" in failed(record)["time"]
    change(record / "train_seed1.log", r"^total_eval_time:.*", "total_eval_time:599.5s")
    assert "time" not in failed(record)
    change(
        record / "train_seed1.log",
        r"^(warmup_step:)",
        r"resumed:logs/x.step00000003.npz step:3\n\1",
    )
    assert "interrupted and resumed: train_seed1.log" in failed(record)["time"]


def test_the_test_against_a_row_has_both_bars_in_both_units(copy):
    holds, text = verdicts(copy, str(copy))["statistics"]
    assert holds is None
    assert "0.005 nats per token, here" in text
    assert "not reached" in text


def test_figures_agree_at_the_precision_at_which_they_are_stated():
    assert check_record.agrees("1.0856", [1.08562480])
    assert not check_record.agrees("1.0857", [1.08562480])
    assert check_record.agrees("15987547", [None, 15_987_547])
    assert not check_record.agrees("15987548", [15_987_547])


@pytest.mark.parametrize("dialect", ["old", "new"])
def test_a_folder_of_a_stranger_is_checked_by_its_own_dialect(tmp_path, dialect):
    folder = tmp_path / "track_non_record_16mb" / "2026-04-05_Stranger"
    folder.mkdir(parents=True)
    (folder / "train.log").write_text(getattr(helpers_logs, dialect)())
    run = Run.read(folder / "train.log")
    (folder / "train_gpt.py").write_text("#" * run.bytes_code)
    (folder / "README.md").write_text(
        f"# S\n\n| Seed | bpb |\n|---|---|\n| {run.seed or 42} | {run.score.bpb:.4f} |\n"
    )
    fields = dict.fromkeys(("author", "github_id", "name", "blurb"), "x") | {
        "date": "2026-04-05T00:00:00Z"
    }
    fields |= {"val_bpb": run.score.bpb, "val_loss": run.score.loss, "bytes_total": run.bytes_total}
    (folder / "submission.json").write_text(json.dumps(fields))
    assert set(failed(folder)) <= {"source"}
    change(folder / "README.md", r"\d\.\d{4}", "1.2345")
    assert "1.2345 is not what the logs give" in failed(folder)["README"]


# ---- What check_record.py runs


def findings(check, folder: Path) -> dict[str, tuple[bool | None, str]]:
    return {f.check: (f.holds, f.text) for f in check(check_record.Folder.read(folder))}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("print('hello')", "but prints 'hello'"),
        ("import runlog", "No module named 'runlog'"),
        ("import zstandard", "No module named 'zstandard', which is optional"),
        ("assert torch.cuda.is_available(), 'CUDA is required'", "CUDA is required"),
    ],
)
def test_a_script_that_cannot_be_imported_on_a_reviewers_machine_is_found(copy, line, text):
    source = SOURCE.replace(b"import torch\n", b"import torch\n" + line.encode() + b"\n", 1)
    (copy / "train_gpt.py").write_bytes(make_record.pack_script(source))
    found = findings(check_record.check_import, copy)
    assert found["import"][0] is False
    assert text in found["import"][1]


def test_a_script_that_is_not_the_one_that_ran_is_found(copy):
    other = SOURCE.replace(b"matrix_lr: float = 0.022", b"matrix_lr: float = 0.023")
    (copy / "train_gpt.py").write_bytes(make_record.pack_script(other))
    found = findings(check_record.check_import, copy)
    assert found["import"][0] is True
    assert found["source"] == (False, "not what the logs ran")


def test_a_script_that_fails_in_its_first_steps_is_found(copy):
    broken = SOURCE.replace(b"def train_step(", b"def train_step(unknown, ", 1)
    (copy / "train_gpt.py").write_bytes(make_record.pack_script(broken))
    found = findings(check_record.check_smoke, copy)
    assert found["smoke"][0] is False
    assert "Error: " in found["smoke"][1]


@pytest.mark.slow
def test_the_command_line_is_silent_but_for_the_table_and_says_by_its_status_whether_all_holds(
    copy, tmp_path
):
    command = [sys.executable, ROOT / "records" / "check_record.py", copy]
    environment = full_environment({})
    good = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert good.returncode == 0, good.stdout + good.stderr
    assert good.stderr == ""
    lines = good.stdout.splitlines()
    assert lines[:2] == ["| check | finding | |", "|---|---|---|"]
    assert all(line.startswith("| ") and line.endswith((" pass |", " - |")) for line in lines[2:])
    assert "| smoke | ITERATIONS=10 TRAIN_BATCH_TOKENS=4096 TRAIN_SEQ_LEN=256 | pass |" in lines
    assert any(
        line.startswith("| evaluation | eval_sliding.py: final_sliding_window_exact val_loss")
        for line in lines
    )
    resubmit(copy, val_bpb=1.0)
    bad = run_in_process(check_record.main, {}, tmp_path, "--no-run", copy)
    assert bad.code == 1
    assert "| scores | val_bpb is 1.0, the logs give" in bad.out
    assert all(path.is_file() for path in copy.iterdir()), "it ran in a copy"


def test_what_is_no_records_folder_is_refused(tmp_path):
    def run(*argv: object) -> Result:
        return run_in_process(check_record.main, {}, tmp_path, *argv)

    assert_refused(run(tmp_path / "none"), "none: no such folder")
    assert_refused(run(tmp_path), "no records folder")
    assert_refused(run(), "--help")


@pytest.mark.parametrize("tool", ["make_record", "check_record", "runlog"])
def test_help_has_an_example_and_works_from_anywhere(tool, tmp_path, monkeypatch):
    result = run_in_process(importlib.import_module(tool).main, {}, tmp_path, "--help")
    assert result.code == 0
    assert f"    python records/{tool}.py " in result.out


# ---- Statistics


def test_welch_and_the_bar_of_the_challenge():
    row = leaderboard.Baseline("row", 1.0810, 2.79, [1.0808, 1.0810, 1.0812], (None, None))
    nats = 2.583  # per bit per byte, sp8192
    better = row.compare([1.0700, 1.0702, 1.0704], nats)
    assert better.bpb == pytest.approx(-0.0108)
    assert better.nats == pytest.approx(-0.0108 * nats)
    assert f"here {0.005 / nats:.5f} bits per byte, at p < 0.01: reached" in better.verdict
    slightly = row.compare([1.0806, 1.0808, 1.0810], nats)
    assert (better.reached, slightly.reached) == (True, False)
    assert "not reached" in slightly.verdict
    assert "better by 0.00020 bits per byte" in slightly.verdict
    worse = row.compare([1.0900, 1.0902, 1.0904], nats)
    assert "not reached" in worse.verdict
    assert "worse by 0.00920 bits per byte" in worse.verdict
    assert "No test" in row.compare([1.07], nats).verdict
    assert row.compare([1.07], nats).reached is None
    almost = row.compare(
        [1.0791, 1.0793, 1.0795], nats
    )  # p < 0.01 that it is better, but by less than the bar
    assert almost.reached is False
    assert row.compare([1.03, 1.07, 1.11], nats).reached is False, (
        "by more than the bar, but not surely"
    )
    # By hand: three against three of equal spread s, t = d / (s * sqrt(2 / 3)), 4 degrees of freedom.
    from scipy.stats import t

    stated = float(re.search(r"p = (\S+) that it is no better", slightly.verdict)[1])
    assert stated == pytest.approx(t.cdf(-0.0002 / (0.0002 * (2 / 3) ** 0.5), 4), rel=0.05)


def test_rows_and_logs_are_compared_with_runs_of_the_same_text_only(workshop):
    run = Run.read(workshop.log(1))
    challenge = replace_targets(run, 40_540_160)
    row, logs = (
        leaderboard.find_baseline(["1394"]),
        leaderboard.find_baseline([str(workshop.log(2))]),
    )
    assert row.same_text(challenge)
    assert not row.same_text(run)
    assert logs.same_text(run)
    assert not logs.same_text(challenge)
    folder = leaderboard.find_baseline([str(workshop.folder)])
    assert sorted(folder.seeds) == sorted(Run.read(workshop.log(seed)).score.bpb for seed in (1, 2))
    assert len(row.seeds) == 5
    assert row.val_bpb == pytest.approx(statistics.mean(row.seeds), abs=1e-8)


def replace_targets(run: Run, targets: int) -> Run:
    return replace(
        run, text=re.sub(r'"target_tokens": \d+', f'"target_tokens": {targets}', run.text)
    )


def test_the_rows_of_the_leaderboard_are_in_order_and_consistent():
    rows = leaderboard.read_rows()
    assert [row.val_bpb for row in rows] == sorted(row.val_bpb for row in rows)
    assert all(abs(statistics.mean(row.seeds) - row.val_bpb) < 1e-7 for row in rows if row.seeds)
    assert leaderboard.find_row("best").pr == "2135"
    assert leaderboard.find_row("baseline").val_bpb == pytest.approx(1.2243657)


def test_committed_records_pass_their_own_check():
    folders = [path.parent for path in (ROOT / "records").glob("track_*/*/submission.json")]
    assert folders
    for folder in folders:
        assert failed(folder) == {}, folder

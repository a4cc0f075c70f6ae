"""What users of records/ablate.py rely on, mostly with a stub in place of the trainer.   pytest tests/test_ablate.py"""

import csv
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ablate
import pytest
from helpers_cli import (
    ROOT,
    TINY_MODEL,
    TINY_RUN,
    assert_refused,
    full_environment,
    run_in_process,
    write_dataset,
)
from make_record import pack_script

import train_gpt

KNOBS = """
from dataclasses import dataclass, fields
from types import SimpleNamespace

@dataclass(frozen=True)
class Hyperparameters:
    seed: int = 0
    run_id: str = ""
    iterations: int = 10
    train_batch_tokens: int = 100
    max_wallclock_seconds: float = 0.0
    target_bytes: int = 0
    shared_dim: int = 200
    expert_dim: int = 8
    overhead: int = 0
    gain: float = 0.0
    fail_on: str = ""
    hang_on: str = ""
    notes: str = ""

    @classmethod
    def from_env(cls, environ):
        knobs = {f.name: f for f in fields(cls)}
        return cls(**{k.lower(): type(knobs[k.lower()].default)(v) for k, v in environ.items() if k.lower() in knobs})

class GPT:
    def __init__(self, hp):
        self.hp = hp

    def parameters(self):
        return [SimpleNamespace(numel=lambda: self.hp.shared_dim)]

def model_bytes(hp):
    return 300 + hp.overhead + 9 * hp.shared_dim + 400 * hp.expert_dim

def dry_run(hp, model):
    return SimpleNamespace(artifact=bytes(model_bytes(hp)))
"""
TRAIN = """
import json, os, sys, time
from pathlib import Path

def main():
    env, run = os.environ, os.environ["RUN_ID"]
    seed, gain = int(env["SEED"]), float(env.get("GAIN", 0))
    if env.get("NOTES"):
        with open(env["NOTES"], "a") as notes:
            notes.write(f"{run} {os.getpid()} {env['OMP_NUM_THREADS']} {sorted(os.sched_getaffinity(0))}\\n")
    if env.get("HANG_ON") == run and not Path(env["NOTES"] + ".hung").exists():
        Path(env["NOTES"] + ".hung").write_text(str(os.getpid()))
        time.sleep(60)
    how, _, which = env.get("FAIL_ON", "").partition(":")
    if which == run and how == "die":
        print("half way")
        sys.exit("error: no such luck")
    if which == run and how == "stop_parent":
        os.kill(os.getppid(), 15)
        time.sleep(60)
    bpb = 2.0 + 0.1 * seed - gain * (1 + seed % 3)
    size = 300 + int(env.get("OVERHEAD", 0)) + 9 * int(env.get("SHARED_DIM", 200)) + 400 * int(env.get("EXPERT_DIM", 8))
    size += 500 * (how == "fat")
    Path("logs").mkdir()
    Path("logs", run + ".ptz").write_bytes(bytes(size))
    summary = {"event": "train_summary", "partial": which == run and how == "partial", "val_bpb_float": bpb - 0.5,
               "val_bpb": bpb, "train_seconds": 4.0, "steps": 10, "params": 77,
               "bytes_model": size, "tokens": 1000, "environ": dict(env)}
    Path("logs", run + ".txt").write_text("a log\\n" + json.dumps(summary) + "\\n")

if __name__ == "__main__":
    main()
"""
EVALUATE = """
import json, sys
from pathlib import Path
log = Path(sys.argv[1]).with_suffix(".txt")
bpb = json.loads(log.read_text().splitlines()[-1])["val_bpb"] - 0.25
with open(log, "a") as file:
    file.write(json.dumps({"event": "eval_summary", "partial": False, "val_bpb": bpb}) + "\\n")
"""


class Study:
    """A grid and a stub trainer in a folder whose name has spaces."""

    def __init__(self, folder: Path):
        self.folder, self.grid, self.out = (
            folder / "a folder",
            folder / "a folder" / "grid.txt",
            folder / "the out",
        )
        self.script, self.notes = self.folder / "stub.py", self.folder / "notes"
        self.folder.mkdir()
        self.script.write_text(KNOBS + TRAIN)
        (self.folder / "eval_sliding.py").write_text(EVALUATE)

    def write(self, *lines: str) -> None:
        self.grid.write_text("\n".join([f"base NOTES='{self.notes}'", *lines]) + "\n")

    def argv(self, *more: object, out: Path | None = None) -> list:
        return [self.grid, "--out", out or self.out, "--script", self.script, *more]

    def run(
        self,
        *more: object,
        seeds=(1, 2, 3),
        out: Path | None = None,
        env=None,
        cwd: Path | None = None,
    ):
        argv = self.argv("--seeds", *seeds, *more, out=out)
        return run_in_process(ablate.main, env or {}, cwd or self.folder, *argv)

    def started(self) -> list[str]:
        return (
            [line.split()[0] for line in self.notes.read_text().splitlines()]
            if self.notes.exists()
            else []
        )

    def rows(self, out: Path | None = None) -> dict[str, dict[str, str]]:
        """Cells of table.md by cell and column."""
        lines = [
            x
            for x in ((out or self.out) / "table.md").read_text().splitlines()
            if x.startswith("|")
        ]
        names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        return {row[0]: dict(zip(names, row, strict=True)) for row in rows}

    def event(self, name: str, event: str) -> dict:
        return ablate.events_of(self.out / f"{name}.txt")[event]


PLOT = ablate.plot


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    monkeypatch.setattr(
        ablate, "plot", lambda rows: b"a plot"
    )  # which takes as long as several runs of the stub
    made = Study(tmp_path)
    made.write("one", "two GAIN=0.01", "three GAIN=-0.02 OVERHEAD=90")
    return made


# ---- Figures


def test_delta_interval_and_welch_are_those_computed_by_hand(study):
    assert study.run("--solve", "off", "--only", "one", "two").code == 0
    row, control = study.rows()["two"], study.rows()["one"]
    # Scores 1.85 1.95 2.05 against 1.83 1.92 2.04: pooled variance (0.01 + 0.0111) / 2, t(0.975, 4) = 2.776445.
    half = 2.776445 * math.sqrt(0.01055) * math.sqrt(2 / 3)
    assert row["delta"] == "-0.0200"
    assert row["95 % CI"] == f"{-0.02 - half:+.4f} to {-0.02 + half:+.4f}"
    # Means 0.02 apart, variances 0.01 and 0.0111: Welch's t = -0.2385.
    assert (control["mean"], control["std"], control["float mean"]) == (
        "1.9500",
        "0.1000",
        "1.7000",
    )
    assert (row["mean"], row["std"], row["n"]) == ("1.9300", f"{math.sqrt(0.0111):.4f}", "3")
    assert float(row["Welch p"]) == pytest.approx(0.8232, abs=2e-4)
    assert (control["delta"], control["95 % CI"], control["Welch p"]) == ("control", "-", "-")
    assert row["tok/s"] == "250"
    text = (study.out / "table.md").read_text()
    assert (
        f"+-{half:.4f} bpb for a cell with the control's n = 3; standard deviation of seeds, pooled"
        in text
    )
    assert (
        "0.1027 (freedom 4); of differences of the same seed: 0.0100." in text
    )  # of -0.02, -0.03, -0.01
    assert study.rows()["three"]["n"] == "0"


def test_all_seeds_count_whether_the_control_has_them_or_not(study):
    assert study.run("--solve", "off", "--only", "one", seeds=(1, 2, 4, 5)).code == 0
    assert study.run("--solve", "off", "--only", "two", seeds=(2, 3)).code == 0
    row = study.rows()["two"]
    # Means 2.05 and 1.98, squares 0.1 and 0.0072 with 3 + 1 degrees of freedom.
    half = 2.776445 * math.sqrt(0.1072 / 4) * math.sqrt(1 / 2 + 1 / 4)
    assert (row["delta"], row["n"]) == ("-0.0700", "2")
    assert row["95 % CI"] == f"{-0.07 - half:+.4f} to {-0.07 + half:+.4f}"
    # Scores 1.85 1.95 2.15 2.25 against 1.92 2.04: Welch's t = 0.6408 with 3.9438 degrees of freedom.
    assert float(row["Welch p"]) == pytest.approx(0.5570, abs=2e-4)


def test_the_interval_pools_the_spread_of_all_cells():
    spread, freedom = ablate.pooled_deviation([[], [0.01, 0.03], [0.02, 0.05, 0.05], [0.7]])
    assert freedom == 3  # a single value says nothing about the spread
    assert spread == pytest.approx(math.sqrt((0.0002 + 0.0006) / 3))
    half = ablate.half_width(spread, freedom, 4, 6)
    assert half == pytest.approx(3.182446 * spread * math.sqrt(1 / 4 + 1 / 6), rel=1e-6)


def test_one_row_per_run_in_results_and_a_plot(study, monkeypatch):
    monkeypatch.setattr(ablate, "plot", PLOT)
    assert study.run(seeds=(2, 1)).code == 0
    with open(study.out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["cell"], r["seed"]) for r in rows] == [
        (c, s) for c in ("one", "two", "three") for s in "12"
    ]
    assert (float(rows[0]["val_bpb"]), float(rows[0]["val_bpb_float"])) == pytest.approx(
        (1.85, 1.6)
    )
    assert (rows[0]["tok_per_s"], rows[0]["log"], rows[0]["bytes_model"]) == (
        "250.0",
        "one_seed1.txt",
        "5300",
    )
    assert (study.out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert study.started() == [
        f"{cell}_seed{seed}" for seed in (2, 1) for cell in ("one", "two", "three")
    ]
    assert (study.out / "artifacts" / "one_seed1.ptz").stat().st_size == 5300


def test_the_score_is_the_artifacts_if_asked_for(study):
    assert study.run("--score", "artifact", seeds=[1]).code == 0
    assert study.rows()["one"]["mean"] == "2.1000"
    assert "eval_summary" not in ablate.events_of(study.out / "one_seed1.txt")
    assert_refused(study.run(seeds=[1]), "one_seed1.txt was made with --score artifact")


# ---- Equal bytes


def test_the_solver_finds_the_width_of_brute_force_and_runs_have_it(study):
    study.write(
        "one",
        "two OVERHEAD=95",
        "wide SHARED_DIM=7 OVERHEAD=-95",
        "experts OVERHEAD=800 SOLVE=EXPERT_DIM",
    )
    assert study.run(seeds=[1]).code == 0

    def best(size):
        return min(range(1, 2000), key=lambda width: abs(size(width) - 5300))

    wanted = {
        "one": "-",
        "two": f"SHARED_DIM={best(lambda w: 3595 + 9 * w)}",
        "wide": f"SHARED_DIM={best(lambda w: 3405 + 9 * w)}",
        "experts": f"EXPERT_DIM={best(lambda w: 2900 + 400 * w)}",
    }
    assert {name: row["solved width"] for name, row in study.rows().items()} == wanted
    knobs = study.event("wide_seed1", "ablation")["knobs"]
    assert f"SHARED_DIM={knobs['SHARED_DIM']}" == wanted["wide"]
    assert (
        study.event("wide_seed1", "train_summary")["environ"]["SHARED_DIM"] == knobs["SHARED_DIM"]
    )


@pytest.mark.parametrize("start", [1, 50, 65_536])
def test_the_nearest_width_is_found_from_any_start_at_any_step(start):
    for goal in (0, 100, 1_234, 10**7):
        for step in (1, 8):
            found = ablate.nearest_width(lambda width: 10 * width + 3, start, goal, step)
            widths = range(step, ablate.MAX_WIDTH + 1, step)
            assert abs(10 * found + 3 - goal) == min(abs(10 * width + 3 - goal) for width in widths)


def test_the_solver_on_the_trainer_itself(tmp_path):
    knobs = {k: str(v) for k, v in TINY_MODEL.items()} | {
        "TRAIN_BATCH_TOKENS": "128",
        "EVAL_STRIDE": "8",
    }
    source = ablate.Source.read(ROOT / "train_gpt.py")
    dense = ablate.Cell("dense", "grid", source, "off", knobs | {"ROUTING": "dense"})
    routed = ablate.Cell("zipf", "grid", source, "SHARED_DIM", knobs | {"ROUTING": "zipf"})
    goal = ablate.estimate(dense)[0]
    found = ablate.solve(routed, goal)
    around = range(found["width"] - 4, found["width"] + 5)
    sizes = {width: ablate.estimate(routed, SHARED_DIM=width)[0] for width in around}
    assert abs(found["bytes"] - goal) == min(abs(size - goal) for size in sizes.values())
    assert found["bytes"] == sizes[found["width"]]
    uniform = ablate.Cell("modulo", "grid", source, "off", knobs | {"ROUTING": "modulo"})
    assert (
        ablate.estimate(routed)[0] - ablate.estimate(uniform)[0] > 340 * 2 * 2 / 8 / 2
    )  # tokens, layers, bits each
    router = ablate.Cell("learned", "grid", source, "off", knobs | {"ROUTING": "learned"})
    mixed = ablate.Cell("soft", "grid", source, "off", knobs | {"ROUTING": "soft"})
    assert abs(ablate.estimate(router)[0] - ablate.estimate(mixed)[0]) < 20  # the same tensors
    assert (
        ablate.estimate(mixed)[0] - ablate.estimate(uniform)[0] > 2 * 4 * 32 * 2 * 0.8
    )  # routers, in float16
    assert found["width"] < 32  # the routing table takes bytes, which the shared expert gives up
    assert abs(found["bytes"] - goal) < 0.01 * goal


def test_a_cell_that_cannot_have_equal_bytes_is_refused_before_any_run(study):
    study.write("one", "coarse SOLVE=EXPERT_DIM OVERHEAD=150")
    fragments = ("line 3: cell coarse", "EXPERT_DIM=8 gives 5,450 bytes", "control one has 5,300")
    assert_refused(study.run(), *fragments)
    assert_refused(study.run(), *fragments)
    assert study.started() == []


def test_bytes_that_differ_in_the_end_give_no_delta_and_status_1(study):
    study.write("one", "two FAIL_ON=fat:", "three")
    assert study.run(seeds=(1, 2)).code == 1
    row = study.rows()["two"]
    assert (row["delta"], row["95 % CI"], row["Welch p"]) == (
        f"bytes differ by {100 * 500 / 5300:.1f} %",
        "-",
        "-",
    )
    assert study.rows()["three"]["delta"] == "+0.0000"


def test_widths_are_solved_once_and_again_for_another_control(study, monkeypatch):
    assert study.run("--dry-run").code == 0
    solved, original = [], ablate.solve
    monkeypatch.setattr(
        ablate, "solve", lambda cell, goal: solved.append(cell.name) or original(cell, goal)
    )
    assert study.run("--dry-run").code == 0
    assert solved == []
    study.write("one OVERHEAD=9", "two GAIN=0.01", "three GAIN=-0.02 OVERHEAD=90")
    assert study.run("--dry-run").code == 0
    assert solved == ["two", "three"]


def test_a_dry_run_shows_the_plan_and_runs_nothing(study):
    result = study.run("--dry-run")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "one: 5,300 bytes, 200 parameters, 5.00 tokens per parameter",
        "two SHARED_DIM=200: 5,300 bytes, 200 parameters, 5.00 tokens per parameter",
        "three SHARED_DIM=190: 5,300 bytes, 190 parameters, 5.26 tokens per parameter",
        "9 of 9 runs to do",
    ]
    assert study.started() == []


@pytest.mark.slow
def test_the_trainer_itself_fills_both_cells_to_the_same_bytes(study, tmp_path):
    data = write_dataset(tmp_path / "data" / "set")
    skipped = {"RUN_ID", "ITERATIONS"}
    words = [
        f"{key}={value}" for key, value in (TINY_MODEL | TINY_RUN).items() if key not in skipped
    ]
    study.grid.write_text(
        f"base {' '.join(words)}\nbase ITERATIONS=4\ndense ROUTING=dense\nzipf ROUTING=zipf\n"
    )
    env = {
        "DATA_PATH": os.path.relpath(data.folder, tmp_path),
        "TOKENIZER_PATH": str(data.tokenizer),
    }
    argv = [study.grid, "--out", study.out, "--seeds", 5, "--model-bytes", 14_000]
    result = run_in_process(ablate.main, env, tmp_path, *argv)
    assert result.code == 0, (result.out, result.err)
    rows = study.rows()
    sizes = [int(row["model bytes"].replace(",", "")) for row in rows.values()]
    assert all(0.99 * 14_000 < size <= 14_000 for size in sizes)
    assert re.fullmatch(r"[+-]\d\.\d{4}", rows["zipf"]["delta"])
    assert rows["zipf"]["solved width"].startswith("SHARED_DIM=")
    for name in ("dense", "zipf"):
        closing = study.event(f"{name}_seed5", "ablation")
        assert (
            rows[name]["mean"] == f"{study.event(f'{name}_seed5', 'eval_summary')['val_bpb']:.4f}"
        )
        code = len(pack_script(train_gpt.submission_source()))
        assert closing["knobs"]["TARGET_BYTES"] == str(14_000 + code)
        assert closing["knobs"]["DATA_PATH"] == str(data.folder)
        artifact = (study.out / "artifacts" / f"{name}_seed5.ptz").read_bytes()
        assert artifact.startswith(train_gpt.ARTIFACT_MAGIC)
        assert f"{len(artifact):,}" == rows[name]["model bytes"]
        assert "def load_artifact" not in (study.out / f"{name}_seed5.txt").read_text()
    (source,) = (study.out / "sources").iterdir()
    assert source.read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert closing["script_sha256"].startswith(source.stem)


# ---- Grid


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cell GAIN", "'GAIN': expected KEY=VALUE"),
        ("cell gain=1", "'gain=1': expected KEY=VALUE"),
        ("cell GAIN='1", "No closing quotation"),
        ("one GAIN=1", "there is a cell one already"),
        ("a/b GAIN=1", "'a/b': letters"),
        ("cell SEED=1", "SEED is not a cell's to set"),
        ("base RUN_ID=x", "RUN_ID is not a cell's to set"),
        ("cell GAIN=1 GAIN=2", "GAIN is set twice"),
        ("cell GIAN=1", "cell cell: GIAN: not a knob of stub.py"),
        ("cell GAIN=much", "could not convert string to float: 'much'"),
        ("cell SOLVE=WIDTH", "SOLVE=WIDTH: expected SHARED_DIM, EXPERT_DIM or off"),
    ],
)
def test_a_bad_line_of_the_grid_is_refused_by_file_and_line(study, line, expected):
    study.write("one", "# a comment", "", line)
    assert_refused(study.run(), f"{study.grid} line 5: ", expected)
    assert study.started() == []
    study.write("one", "# a comment", "", "cell GAIN=1  # fine")
    assert study.run("--dry-run").code == 0


def test_other_refusals_before_any_run(study):
    assert_refused(study.run("--only", "one", "four"), "--only four: no such cell")
    assert_refused(study.run("--jobs", 10_000), "--jobs 10000: this process has")
    assert_refused(study.run("--frobnicate"), "--frobnicate", "--help")
    study.write("one SOLVE=EXPERT_DIM", "two")
    assert_refused(study.run(), "line 2: SOLVE in the control")
    study.write("one", "two SCRIPT=none.py")
    assert_refused(study.run(), str(study.folder / "none.py"), "no such script")
    study.write()
    assert_refused(study.run(), "no cells")
    assert study.started() == []


def test_a_trainer_without_data_is_refused(study):
    study.grid.write_text("one DEVICE=cpu\n")
    result = run_in_process(
        ablate.main, {}, study.folder, study.grid, "--out", study.out, "--seeds", 1
    )
    assert_refused(result, "line 1: cell one has no DATA_PATH")


def test_a_missing_package_is_one_clear_line(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert_refused(study.run(), "ablate.py needs scipy: pip install scipy")
    assert study.started() == []


def test_a_script_without_knobs_runs_with_any_setting_but_cannot_be_solved(study):
    (study.folder / "variants").mkdir()
    (study.folder / "variants" / "other.py").write_text(TRAIN)
    shutil.copy(study.folder / "eval_sliding.py", study.folder / "variants")
    study.write("one", "other SCRIPT=variants/other.py ANYTHING=x")
    assert_refused(
        study.run(), "line 3: cell other", "SOLVE=SHARED_DIM needs", "other.py", "SOLVE=off"
    )
    study.write("one", "other SCRIPT=variants/other.py ANYTHING=x SOLVE=off")
    assert study.run(seeds=[1]).code == 0
    assert study.event("other_seed1", "train_summary")["environ"]["ANYTHING"] == "x"
    hashes = [
        study.event(f"{name}_seed1", "ablation")["script_sha256"] for name in ("one", "other")
    ]
    assert hashes[0] != hashes[1]


def test_knobs_of_the_callers_environment_are_not_inherited_but_paths_are(study):
    env = {
        "GAIN": "9",
        "OVERHEAD": "77",
        "MU": "off",
        "WORLD_SIZE": "2",
        "DATA_PATH": "some data",
        "LC_ALL": "C",
    }
    (study.folder / "plain.py").write_text(TRAIN)
    study.write("one", "two SCRIPT=plain.py", "three SCRIPT=plain.py TOKENIZER_PATH=its/own")
    assert study.run("--solve", "off", seeds=[1], env=env).code == 0
    seen = [
        study.event(f"{name}_seed1", "train_summary")["environ"] for name in ("one", "two", "three")
    ]
    assert not any({"GAIN", "OVERHEAD", "MU", "WORLD_SIZE"} & environ.keys() for environ in seen)
    assert "DATA_PATH" not in seen[0]  # not a knob of the stub
    assert seen[1]["DATA_PATH"] == str(study.folder / "some data")
    assert seen[2]["TOKENIZER_PATH"] == str(study.folder / "its" / "own")
    assert (seen[1]["SEED"], seen[1]["RUN_ID"], seen[1]["LC_ALL"]) == ("1", "two_seed1", "C")


# ---- Resuming


def test_later_cells_and_seeds_extend_the_table_and_nothing_runs_twice(study):
    assert study.run("--only", "one", "two", seeds=[1]).code == 0
    assert study.run(seeds=[1, 2]).code == 0
    result = study.run(seeds=[2])
    assert result.code == 0
    assert [row["n"] for row in study.rows().values()] == ["2", "2", "2"]
    assert sorted(study.started()) == sorted(
        f"{c}_seed{s}" for c in ("one", "two", "three") for s in (1, 2)
    )


def test_the_same_command_works_from_another_folder(study, tmp_path):
    assert study.run(seeds=[1]).code == 0
    before = len(study.started())
    relative = [os.path.relpath(path, tmp_path) for path in (study.grid, study.out, study.script)]
    argv = [relative[0], "--out", relative[1], "--script", relative[2], "--seeds", 1, 2]
    result = run_in_process(ablate.main, {}, tmp_path, *argv)
    assert (result.code, result.err) == (0, "")
    assert len(study.started()) == before + 3
    assert re.search(r"^6/6 three seed 2: 2\.0100 \(\d+ s\), ETA 0 s$", result.out, re.M)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("two GAIN=0.02", "made with GAIN=0.01, the grid says GAIN=0.02: use another --out"),
        ("two GAIN=0.01 FAIL_ON=x", "made with no FAIL_ON, the grid says FAIL_ON=x"),
        ("two", "made with GAIN=0.01, the grid says no GAIN"),
    ],
)
def test_a_log_of_other_knobs_is_refused_whatever_is_asked_for(study, line, expected):
    assert study.run(seeds=[1]).code == 0
    before = study.started()
    study.write("one", line)
    assert_refused(
        study.run("--only", "one", seeds=[7]), str(study.out / "two_seed1.txt"), expected
    )
    assert study.started() == before


@pytest.mark.parametrize("name", ["stub.py", "eval_sliding.py"])
def test_a_log_of_another_script_is_refused(study, name):
    assert study.run(seeds=[1]).code == 0
    with open(study.folder / name, "a") as script:
        script.write("# edited\n")
    assert_refused(
        study.run(seeds=[2]), "one_seed1.txt was made with another version of", "stub.py"
    )
    (study.out / "one_seed1.txt").write_text("not a log\n")
    assert_refused(study.run(seeds=[2]), "one_seed1.txt: has no closing line")


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_a_killed_runner_takes_its_run_along_and_the_same_command_gives_the_same_table(
    study, tmp_path
):
    lines = ("one", "two GAIN=0.01", "three GAIN=-0.02 OVERHEAD=90")
    study.write("base HANG_ON=one_seed2", *lines)
    command = [
        sys.executable,
        str(ROOT / "records" / "ablate.py"),
        *map(str, study.argv("--seeds", 1, 2, 3)),
    ]
    hung = Path(f"{study.notes}.hung")
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=full_environment({}),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    ) as runner:
        wait_for(lambda: hung.exists() and hung.read_text())
        child = int(hung.read_text())
        assert is_alive(child)
        assert_refused(study.run(), str(study.out), "another ablate.py is at work there")
        os.kill(runner.pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(child), 5)
    assert {path.name for path in study.out.glob("*_seed*.txt")} == {
        f"{c}_seed1.txt" for c in ("one", "two", "three")
    }
    (study.out / ".table.md.1.tmp").write_text("half of a ta")
    assert study.run().code == 0
    assert not (study.out / ".table.md.1.tmp").exists()
    wanted = [f"{cell}_seed{seed}" for seed in (1, 2, 3) for cell in ("one", "two", "three")]
    assert sorted(study.started()) == sorted([*wanted, "one_seed2"])
    whole = tmp_path / "uninterrupted"
    assert study.run(out=whole).code == 0
    for name in ("table.md", "results.csv"):
        assert (study.out / name).read_bytes() == (whole / name).read_bytes(), name


def test_sigterm_stops_the_run_and_leaves_nothing_half_written(study):
    study.write("one FAIL_ON=stop_parent:one_seed2", "two", "three")
    before = signal.getsignal(signal.SIGTERM)
    result = study.run()
    assert (result.code, result.err) == (143, "error: interrupted by signal 15\n")
    pid = int(study.notes.read_text().splitlines()[-1].split()[1])
    assert not is_alive(pid)
    assert signal.getsignal(signal.SIGTERM) == before
    assert {path.name for path in study.out.glob("*_seed*.txt")} == {
        f"{c}_seed1.txt" for c in ("one", "two", "three")
    }
    assert list(study.out.rglob("*.tmp")) == []
    assert study.rows()["two"]["n"] == "1"


# ---- Failing and several at a time


@pytest.mark.parametrize(
    ("how", "expected"), [("die", "error: no such luck"), ("partial", "train_summary is PARTIAL")]
)
def test_a_failing_run_is_shown_the_others_go_on_and_it_is_tried_again(study, how, expected):
    study.write("one", f"two FAIL_ON={how}:two_seed1", "three")
    result = study.run(seeds=(1, 2))
    assert result.code == 1
    assert f"2/6 two seed 1: FAILED: {expected} (" in result.out
    assert [row["n"] for row in study.rows().values()] == ["2", "1", "2"]
    assert study.rows()["two"]["delta"] == "failed for 1 of 2 seeds"
    printed = (study.out / "failed" / "two_seed1.txt").read_text()
    assert expected in printed
    assert ("half way" in printed) == (how == "die")
    assert study.run(seeds=(1, 2)).code == 1
    assert study.started().count("two_seed1") == 2
    assert len(study.started()) == 7


def test_a_run_that_succeeds_at_last_is_not_called_failed_any_more(study):
    study.write("one", "two")
    (study.out / "failed").mkdir(parents=True)
    (study.out / "failed" / "two_seed1.txt").write_text("it was the weather\n")
    assert study.run("--only", "one", seeds=[1]).code == 1
    assert study.rows()["two"]["delta"] == "failed for 1 of 1 seeds"
    assert study.run(seeds=[1]).code == 0
    assert study.rows()["two"]["delta"] == "+0.0000"
    assert list((study.out / "failed").iterdir()) == []


def test_every_run_has_its_share_of_the_cores(study):
    cores = sorted(os.sched_getaffinity(0))
    assert study.run(seeds=[1]).code == 0
    notes = [line.split(maxsplit=3)[2:] for line in study.notes.read_text().splitlines()]
    assert notes == [[str(len(cores)), str(cores)]] * 3


def test_jobs_get_disjoint_equal_shares(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {9, 2, 3, 5, 7})
    assert ablate.shares(2) == [{2, 3}, {5, 7}]
    assert ablate.shares(5) == [{2}, {3}, {5}, {7}, {9}]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_jobs_give_the_table_of_one_and_a_warning_about_seconds(study, tmp_path):
    assert study.run().code == 0
    other = tmp_path / "two jobs"
    result = study.run("--jobs", 2, out=other)
    assert (result.code, result.err) == (0, "")
    assert (other / "table.md").read_bytes() == (study.out / "table.md").read_bytes()
    study.write("one", "two MAX_WALLCLOCK_SECONDS=5")
    result = study.run("--jobs", 2, seeds=[1], out=tmp_path / "capped")
    assert result.err == "warning: 2 runs at a time share the machine whose seconds cap two\n"


def test_help_shows_an_example(tmp_path):
    result = run_in_process(ablate.main, {}, tmp_path, "--help")
    assert (result.code, result.err) == (0, "")
    assert "python records/ablate.py grid.txt --out study --seeds 1 2 3" in result.out

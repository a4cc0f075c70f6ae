"""What users of records/ablate.py rely on, with a stub as trainer.   pytest tests/test_ablate.py"""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import ablate
import pytest
from helpers_cli import TINY_MODEL, assert_refused, cli_env, run_in_process, wait_for, write_dataset

import train_gpt

# Knobs of the trainer stand for what the stub is to do: MATRIX_LR is how much better the score is,
# SHARED_DIM sets the bytes. {plan} is a file that says which runs fail or hang.
TRAIN = """
import json, os, sys, time
from pathlib import Path

env, run = os.environ, os.environ["RUN_ID"]
plan = json.loads(Path({plan!r}).read_text())
with open(plan["notes"], "a") as notes:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    notes.write(f"{{run}} {{os.getpid()}} {{env['OMP_NUM_THREADS']}} {{cores}}\\n")
if plan.get("die") == run:
    sys.exit("error: no such luck")
if plan.get("hang") == run:
    time.sleep(60)
if plan.get("stop_parent") == run:
    os.kill(plan["runner"], 15)
    time.sleep(60)
seed = int(env["SEED"])
bpb = 2.0 + 0.1 * seed - float(env.get("MATRIX_LR", 0)) * (1 + seed % 3)
size = 5000 + int(env.get("SHARED_DIM", 300))
summary = {{"event": "train_summary", "partial": plan.get("partial") == run, "val_bpb": bpb,
            "val_bpb_float": bpb - 0.5, "train_seconds": 4.0, "steps": 10, "params": 77,
            "bytes_model": size, "tokens": 1000, "environ": dict(env)}}
Path("logs").mkdir(exist_ok=True)
Path("logs", run + ".ptz").write_bytes(bytes(size))
Path("logs", run + ".txt").write_text("a log\\n" + json.dumps(summary) + "\\n")
"""
EVALUATE = """
import json, os, sys
from pathlib import Path
log = Path(sys.argv[1]).with_suffix(".txt")
bpb = json.loads(log.read_text().splitlines()[-1])["val_bpb"] - 0.25
ngram = {"val_bpb": bpb - 0.5} if os.environ.get("NGRAM") == "on" else None
summary = {"event": "eval_summary", "partial": False, "val_bpb": bpb, "ngram": ngram}
with open(log, "a") as file:
    file.write(json.dumps(summary) + "\\n")
"""
CELLS = ("one", "two MATRIX_LR=0.01", "three MATRIX_LR=0.02")


class Study:
    """A grid and a stub trainer in a folder whose name has spaces."""

    def __init__(self, folder: Path):
        self.folder = folder / "a folder"
        self.folder.mkdir()
        self.grid = self.folder / "grid.txt"
        self.out = folder / "the out"
        self.notes = self.folder / "notes"
        self.script = self.folder / "train_gpt.py"
        self.script.write_text(TRAIN.format(plan=str(self.folder / "plan.json")))
        (self.folder / "eval_sliding.py").write_text(EVALUATE)
        self.plan()
        self.write(*CELLS)

    def plan(self, **which: object) -> None:
        which |= {"notes": str(self.notes), "runner": os.getpid()}
        (self.folder / "plan.json").write_text(json.dumps(which))

    def write(self, *lines: str) -> None:
        base = "base DATA_PATH=data TOKENIZER_PATH=its/own"
        self.grid.write_text("\n".join([base, *lines]) + "\n")

    def run(self, *more: object, seeds=(1, 2, 3), env=None):
        argv = [self.grid, "--out", self.out, "--solve", "off", "--seeds", *seeds, *more]
        return run_in_process(ablate.main, env or {}, self.folder, *argv)

    def noted(self) -> list[list[str]]:
        """Return of every run that was started its name, process, threads and cores."""
        text = self.notes.read_text() if self.notes.exists() else ""
        return [line.split() for line in text.splitlines()]

    def started(self) -> list[str]:
        return [name for name, *_ in self.noted()]

    def rows(self) -> dict[str, dict[str, str]]:
        """Return the cells of table.md by cell and column."""
        lines = (self.out / "table.md").read_text().splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:-2]]
        return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}

    def event(self, name: str, event: str) -> dict:
        return ablate.events_of(self.out / f"{name}.txt")[event]


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    made = Study(tmp_path)
    monkeypatch.setattr(ablate, "ROOT", made.folder)
    return made


# ---- Figures


def test_delta_interval_and_welch_are_those_computed_by_hand(study):
    study.write(*CELLS[:2])
    assert study.run().code == 0
    row, control = study.rows()["two"], study.rows()["one"]
    # Scores 1.85 1.95 2.05 against 1.83 1.92 2.04: pooled variance (0.01 + 0.0111) / 2,
    # t(0.975, 4) = 2.776445.
    half = 2.776445 * math.sqrt(0.01055) * math.sqrt(2 / 3)
    assert row["delta"] == "-0.0200"
    assert row["95 % CI"] == f"{-0.02 - half:+.4f} to {-0.02 + half:+.4f}"
    # Means 0.02 apart, variances 0.01 and 0.0111: Welch's t = -0.2385.
    assert float(row["Welch p"]) == pytest.approx(0.8232, abs=2e-4)
    assert (row["mean"], row["std"], row["n"]) == ("1.9300", f"{math.sqrt(0.0111):.4f}", "3")
    assert (control["mean"], control["float mean"], control["tok/s"]) == ("1.9500", "1.7000", "250")
    assert (control["delta"], control["95 % CI"], control["Welch p"]) == ("control", "-", "-")
    text = (study.out / "table.md").read_text()
    assert f"+-{half:.4f} bpb for a cell with the control's n = 3; standard deviation of" in text
    # The same seeds differ by -0.02, -0.03, -0.01.
    assert "0.1027 (freedom 4); of differences of the same seed: 0.0100." in text


def test_the_score_of_the_artifact_is_that_without_a_sliding_window(study):
    study.write(*CELLS[:2])
    assert study.run("--score", "artifact", seeds=(2, 1)).code == 0
    assert study.rows()["one"]["mean"] == "2.1500"
    # Seed by seed, so that a study that is cut short has something of every cell.
    assert study.started() == [f"{cell}_seed{seed}" for seed in (2, 1) for cell in ("one", "two")]
    # Now the score of the sliding window is asked for, which these runs do not have.
    assert_refused(study.run(seeds=[1]), "one_seed1.txt was made with score=artifact")


def test_a_cell_with_a_memory_of_ngrams_is_compared_by_the_score_with_it(study):
    study.write("one", "two NGRAM=on")
    assert study.run().code == 0
    assert study.rows()["two"]["delta"] == "-0.5000"


# ---- Equal bytes


def test_widths_of_equal_bytes_are_solved_before_the_runs_and_only_once(study, monkeypatch):
    monkeypatch.setattr(train_gpt, "submission_bytes", lambda hp, size, what: (0, size))
    tiny = " ".join(f"{name}={value}" for name, value in TINY_MODEL.items())
    base = f"base {tiny} DATA_PATH=data TOKENIZER_PATH=its/own"
    study.grid.write_text(f"{base}\ndense ROUTING=dense\nzipf ROUTING=zipf\nloose SOLVE=off\n")
    argv = [study.grid, "--out", study.out, "--seeds", 1]
    result = run_in_process(ablate.main, {}, study.folder, *argv)
    width = int(re.search(r"^zipf: SHARED_DIM=(\d+) for [\d,]+ bytes$", result.out, re.M)[1])
    assert width < int(TINY_MODEL["SHARED_DIM"])  # which gives up the bytes of the routing table
    assert study.event("zipf_seed1", "ablation")["knobs"]["SHARED_DIM"] == str(width)
    dense, zipf, _ = ablate.read_grid(study.grid, "SHARED_DIM")
    goal = ablate.estimate(dense)
    off = [abs(ablate.estimate(zipf, SHARED_DIM=width + more) - goal) for more in (0, -1, 1)]
    assert off[0] == min(off) < 0.01 * goal
    again = run_in_process(ablate.main, {}, study.folder, *argv)
    assert "SHARED_DIM" not in again.out.splitlines()[0]
    assert study.started() == ["dense_seed1", "zipf_seed1", "loose_seed1"]


def test_bytes_that_differ_in_the_end_give_no_delta_and_status_1(study):
    study.write("one", "two SHARED_DIM=800", "three")
    assert study.run(seeds=(1, 2)).code == 1
    row = study.rows()["two"]
    assert row["delta"] == f"bytes differ by {100 * 500 / 5300:.1f} %"
    assert (row["95 % CI"], row["Welch p"]) == ("-", "-")
    assert study.rows()["three"]["delta"] == "+0.0000"


@pytest.mark.slow
def test_the_trainer_itself_fills_the_bytes_asked_for(tmp_path):
    data = write_dataset(tmp_path / "data" / "set")
    quick = cli_env(data, ITERATIONS=2, GPTQ_BATCHES=0, RUN_ID=None, DATA_PATH="data/set")
    base = " ".join(f"{name}={value}" for name, value in quick.items())
    grid = tmp_path / "grid.txt"
    grid.write_text(f"base {base}\nzipf ROUTING=zipf\n")
    out = tmp_path / "out"
    argv = (grid, "--out", out, "--seeds", 5, "--model-bytes", 20_000)
    result = run_in_process(ablate.main, {}, tmp_path, *argv)
    assert result.code == 0, (result.out, result.err)
    assert 0.98 * 20_000 < (out / "logs" / "zipf_seed5.ptz").stat().st_size <= 20_000
    assert "def load_artifact" not in (out / "zipf_seed5.txt").read_text()
    assert (out / "train_gpt.py").read_text() == Path(train_gpt.__file__).read_text()


# ---- Grid


BAD_LINES = {
    "cell mu=off": "'mu=off': expected KEY=VALUE",
    "cell MU='off": "No closing quotation",
    "one MU=off": "there is a cell one already",
    "a/b MU=off": "'a/b': letters",
    "cell SEED=1": "SEED is not a cell's to set",
    "cell MU=off MU=pid": "MU is set twice",
    "cell MUU=off": "cell cell: MUU: not a knob of either script",
    "cell MU=much": "MU='much': expected one of",
    "cell EVAL_STRIDE=0": "EVAL_STRIDE=0: expected",
    "cell SOLVE=WIDTH": "SOLVE=WIDTH: expected SHARED_DIM or off",
}


def test_a_bad_grid_is_refused_by_file_and_line_before_any_run(study):
    for line, expected in BAD_LINES.items():
        study.write("one", "# a comment", "", line)
        assert_refused(study.run(), f"{study.grid} line 5: ", expected)
    study.write("one SOLVE=SHARED_DIM", "two")
    assert_refused(study.run(), "line 2: SOLVE in the control")
    study.write()
    assert_refused(study.run(), "no cells")
    study.grid.write_text("one\n")
    assert_refused(study.run(), "line 1: cell one has no DATA_PATH")
    assert_refused(study.run("--frobnicate"), "--frobnicate", "--help")
    assert study.started() == []
    study.write("one", "# a comment", "", "cell MU=off  # fine")
    assert study.run(seeds=[1]).code == 0


def test_knobs_of_the_callers_environment_are_not_inherited_but_paths_are(study):
    study.grid.write_text("one MU=pid\ntwo MU=pid TOKENIZER_PATH=its/own\n")
    env = {"MATRIX_LR": "9", "MU": "off", "TTT": "sgd", "WORLD_SIZE": "2", "LC_ALL": "C"}
    env |= {"DATA_PATH": "some data", "TOKENIZER_PATH": "a.model"}
    assert study.run(seeds=[1], env=env).code == 0
    one, two = (study.event(f"{name}_seed1", "train_summary")["environ"] for name in ("one", "two"))
    assert not {"MATRIX_LR", "TTT", "WORLD_SIZE"} & one.keys()
    assert (one["MU"], one["SEED"], one["RUN_ID"]) == ("pid", "1", "one_seed1")
    assert (one["LC_ALL"], one["DATA_PATH"]) == ("C", str(study.folder / "some data"))
    assert two["TOKENIZER_PATH"] == str(study.folder / "its" / "own")


# ---- Resuming


def test_later_cells_and_seeds_extend_the_table_and_nothing_runs_twice(study):
    study.write(*CELLS[:2])
    assert study.run(seeds=[1]).code == 0
    study.write(*CELLS)
    assert study.run(seeds=[1, 2]).code == 0
    assert study.run(seeds=[2]).code == 0
    assert [row["n"] for row in study.rows().values()] == ["2", "2", "2"]
    runs = [f"{cell}_seed{seed}" for cell in ("one", "two", "three") for seed in (1, 2)]
    assert sorted(study.started()) == sorted(runs)


def test_a_log_of_other_knobs_or_scripts_is_refused_whatever_is_asked_for(study):
    assert study.run(seeds=[1]).code == 0
    before = study.started()
    study.write("one", "two MATRIX_LR=0.02")
    expected = "two_seed1.txt was made with MATRIX_LR=0.01, now it is 0.02: use another --out"
    assert_refused(study.run(seeds=[7]), expected)
    study.write("one", "two MATRIX_LR=0.01 MU=off")
    assert_refused(study.run(seeds=[7]), "made with MU=None, now it is off")
    study.write(*CELLS)
    log = study.out / "one_seed1.txt"
    log.rename(study.out / "one_seed2.txt")
    assert_refused(study.run(), "one_seed2.txt was made with seed=1")
    (study.out / "one_seed2.txt").rename(log)
    study.script.write_text(study.script.read_text() + "# edited\n")
    assert_refused(study.run(seeds=[2]), "one_seed1.txt was made with script_sha256=")
    log.write_text("not a log\n")
    assert_refused(study.run(seeds=[2]), "one_seed1.txt: has no closing line")
    assert study.started() == before


def wait_for_end(pid: int) -> None:
    status = Path(f"/proc/{pid}/status")
    wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text())


@pytest.mark.slow
def test_a_second_runner_is_refused_and_a_killed_one_goes_on(study):
    study.plan(hang="one_seed2")
    code = "import sys, ablate, pathlib; ablate.ROOT = pathlib.Path.cwd(); ablate.main()"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    argv = ["grid.txt", "--out", "../the out", "--solve", "off", "--seeds", "1", "2", "3"]
    command = [sys.executable, "-c", code, *argv]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=study.folder, env=env, stdout=quiet) as runner:
        wait_for(lambda: "one_seed2" in study.started())
        assert_refused(study.run(), str(study.out), "another ablate.py")
        runner.kill()
    # The run that it left behind still has the folder.
    assert_refused(study.run(), "or a run it left behind")
    child = int(study.noted()[-1][1])
    os.kill(child, signal.SIGKILL)
    wait_for_end(child)
    study.plan()
    assert study.run().code == 0
    assert [row["n"] for row in study.rows().values()] == ["3", "3", "3"]
    assert len(study.started()) == 10


def test_sigterm_stops_the_runs_and_files_none_of_them(study):
    study.plan(stop_parent="one_seed2")
    result = study.run()
    assert (result.code, result.err) == (143, "error: interrupted by signal 15\n")
    wait_for_end(int(study.noted()[-1][1]))
    names = {path.name for path in study.out.glob("*_seed*.txt")}
    assert names == {f"{cell}_seed1.txt" for cell in ("one", "two", "three")}


# ---- Failing and several at a time


@pytest.mark.parametrize(
    ("how", "expected"), [("die", "error: no such luck"), ("partial", "train_summary is PARTIAL")]
)
def test_a_failing_run_is_shown_the_others_go_on_and_it_is_tried_again(study, how, expected):
    study.plan(**{how: "two_seed1"})
    result = study.run(seeds=(1, 2))
    assert result.code == 1
    assert f"2/6 two seed 1: FAILED: {expected}, " in result.out
    assert [row["n"] for row in study.rows().values()] == ["2", "1", "2"]
    assert study.rows()["two"]["delta"] == "unfinished for 1 of 2 seeds"
    assert (study.out / "logs" / "two_seed1.out").exists()
    study.plan()
    assert study.run(seeds=(1, 2)).code == 0
    assert study.rows()["two"]["n"] == "2"
    assert len(study.started()) == 7
    assert {path.suffix for path in (study.out / "logs").iterdir()} == {".ptz"}


def test_two_jobs_give_the_table_of_one_each_on_its_own_share_of_the_cores(study):
    assert study.run().code == 0
    table = (study.out / "table.md").read_bytes()
    study.out = study.folder / "two jobs"
    result = study.run("--jobs", 2)
    assert result.code == 0
    assert result.err == "warning: runs that seconds cap share the machine\n"
    assert (study.out / "table.md").read_bytes() == table
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    half = max(1, len(cores) // 2)
    notes = [tuple(facts) for _, _, *facts in study.noted()]
    assert set(notes[:9]) == {(str(len(cores)), ",".join(cores))}
    shares = {(str(half), ",".join(part)) for part in (cores[:half], cores[half : 2 * half])}
    assert set(notes[9:]) == {share for share in shares if share[1]}

"""run_8xh100.sh end to end on a tiny data set, in a copy of the scripts.   python -m pytest tests/test_launcher.py"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_cli import ROOT, TINY_MODEL, Result, full_environment, write_dataset

SCRIPTS = ["run_8xh100.sh", "train_gpt.py", "eval_sliding.py", "requirements.txt"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the scripts and tools alone, and a data set in the challenge's layout beside them."""
    folder = tmp_path_factory.mktemp("launcher")
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    for tools in ("records", "data"):
        shutil.copytree(
            ROOT / tools, folder / tools, ignore=shutil.ignore_patterns("track_*", "datasets")
        )
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "requirements.txt", folder / "tests")
    data = write_dataset(
        folder / "corpus" / "datasets" / f"fineweb10B_sp{TINY_MODEL['VOCAB_SIZE']}"
    )
    (folder / "corpus" / "tokenizers").mkdir()
    shutil.move(
        data.tokenizer,
        folder / "corpus" / "tokenizers" / f"fineweb_{TINY_MODEL['VOCAB_SIZE']}_bpe.model",
    )
    return folder


def start(folder: Path, *arguments: str, **env: object) -> subprocess.Popen:
    """`bash run_8xh100.sh` with this Python first on PATH and DATA_PATH relative to the folder."""
    data = f"corpus/datasets/fineweb10B_sp{TINY_MODEL['VOCAB_SIZE']}"
    base = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DATA_PATH": data,
    }
    environment = full_environment(base | {name: str(value) for name, value in env.items()})
    command, pipe = ["bash", "run_8xh100.sh", *arguments], subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def launch(folder: Path, *arguments: str, **env: object) -> Result:
    process = start(folder, *arguments, **env)
    output = process.communicate()
    return Result(process.returncode, *output)


def test_one_command_trains_exports_scores_and_sums_up(workplace):
    result = launch(workplace, PROFILE="smoke", ITERATIONS=3, RUN_ID="smoke")
    assert result.code == 0, result.err
    log = (workplace / "logs" / "smoke.txt").read_text()
    events = [json.loads(line) for line in log.splitlines() if line.startswith('{"event": ')]
    assert [event["event"] for event in events] == ["train_summary", "eval_summary"]
    assert events[0]["steps"] == 3, "the user's ITERATIONS beats the profile's"
    assert events[0]["bytes_model"] == (workplace / "logs" / "smoke.ptz").stat().st_size
    summary = result.out.splitlines()[-6:]
    assert summary[0].split() == [
        "val_bpb",
        "before",
        "quantization",
        f"{events[0]['val_bpb_float']:.4f}",
    ]
    assert f"{events[1]['val_bpb']:.4f}" in summary[2]
    assert f"= {events[0]['bytes_total']:,} of 16,000,000 bytes" in summary[3]


@pytest.mark.slow
def test_seeds_end_with_the_records_folder_and_its_check(workplace):
    arguments = "--name Two --author 'A. Name' --allow-commit"
    tiny = {"PROFILE": "smoke", "ITERATIONS": 3, "RUN_ID": "group", "GPTQ_BATCHES": 1}
    result = launch(workplace, SEEDS="7 8", RECORD_ARGS=arguments, **tiny)
    assert result.code == 0, result.out + result.err
    (folder,) = (workplace / "records" / "track_non_record_16mb").iterdir()
    assert folder.name.endswith("_Two")
    submission = json.loads((folder / "submission.json").read_text())
    assert (submission["seeds"], submission["author"]) == ([7, 8], "A. Name")
    assert "| C1 causal |" in (folder / "README.md").read_text()
    table = result.out.split("| check | finding | |")[1]
    assert "| smoke | ITERATIONS=10" in table
    assert "FAIL" not in table


def test_a_record_of_uncommitted_code_is_refused_before_it_is_trained(workplace):
    result = launch(workplace, SEEDS="7", PROFILE="smoke", RUN_ID="uncommitted")
    assert result.code == 2
    assert "not a clean commit" in result.err
    assert not (workplace / "logs" / "uncommitted_seed7.txt").exists()


@pytest.mark.slow
def test_two_nodes_train_one_model_through_torchruns_own_arguments(workplace):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tiny = {
        "PROFILE": "smoke",
        "ITERATIONS": 3,
        "RUN_ID": "nodes",
        "GPTQ_BATCHES": 2,
        "DEVICE": "cpu",
    }
    shared = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    nodes = [start(workplace, f"--node_rank={rank}", *shared, **tiny) for rank in (0, 1)]
    outputs = [node.communicate() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    log = (workplace / "logs" / "nodes.txt").read_text()
    assert " world_size:2 " in log
    assert log.count("train_summary") == 2, "once in the source, once at the end"
    assert "val_bpb by sliding window" in outputs[0][0]
    assert "val_bpb by sliding window" not in outputs[1][0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_lets_the_training_save_and_the_same_command_goes_on(
    workplace, number, code
):
    run_id = f"signal{int(number)}"
    knobs = {
        "PROFILE": "smoke",
        "RUN_ID": run_id,
        "CHECKPOINT_EVERY": 1000,
        "RESUME": "auto",
        "GPTQ_BATCHES": 1,
    }
    process, log = (
        start(workplace, ITERATIONS=100_000, **knobs),
        workplace / "logs" / f"{run_id}.txt",
    )
    until = time.perf_counter() + 60
    while not (log.exists() and "\nstep:3/" in log.read_text()):
        assert time.perf_counter() < until
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == f"error: interrupted by signal {int(number)}\n"
    saved = re.search(rf"checkpoint:logs/{run_id}\.step(\d+)\.npz", out)
    assert "val_bpb by sliding window" not in out
    again = launch(workplace, ITERATIONS=int(saved[1]) + 1, **knobs)
    assert again.code == 0, again.err
    assert f"resumed:logs/{run_id}.step{saved[1]}.npz" in again.out
    assert "val_bpb by sliding window" in again.out


def test_torchrun_arguments_without_a_run_id_are_refused(workplace):
    result = launch(workplace, "--nnodes=2")
    assert result.code == 2
    assert result.err == "error: torchrun arguments need a RUN_ID, the same on every node\n"


ROUTINGS = "zipf cluster hash modulo learned hybrid soft dense"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PROFILE": "fast"}, "error: PROFILE=fast: expected record, 1gpu, cpu or smoke"),
        (
            {"PROFILE": "smoke", "ROUTING": "zpif"},
            f"error: ROUTING='zpif': expected one of {ROUTINGS}",
        ),
        ({"PROFILE": "smoke", "DATA_PATH": "nowhere"}, "error: DATA_PATH=nowhere: no such folder"),
    ],
)
def test_a_stage_that_fails_ends_the_chain_with_its_line(workplace, env, message):
    result = launch(workplace, RUN_ID="failed", **env)
    assert result.code == 2
    assert result.err.splitlines()[-1] == message
    assert not (workplace / "logs" / "failed.ptz").exists()

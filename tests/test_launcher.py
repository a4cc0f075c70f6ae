"""run_8xh100.sh end to end on a tiny data set, in a copy of the scripts."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_cli import ROOT, VOCAB_SIZE, Result, full_environment, wait_for, write_dataset

pytestmark = pytest.mark.slow

SCRIPTS = ["run_8xh100.sh", "train_gpt.py", "eval_sliding.py", "requirements.txt"]
DATA = f"corpus/datasets/fineweb10B_sp{VOCAB_SIZE}"
TINY = {"PROFILE": "smoke", "ITERATIONS": 3, "GPTQ_BATCHES": 1}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with scripts and tools alone, and data in the challenge's layout beside them."""
    folder = tmp_path_factory.mktemp("launcher")
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    for tools in ("records", "data"):
        skipped = shutil.ignore_patterns("track_*", "datasets")
        shutil.copytree(ROOT / tools, folder / tools, ignore=skipped)
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "requirements.txt", folder / "tests")
    data = write_dataset(folder / DATA)
    tokenizers = folder / "corpus" / "tokenizers"
    tokenizers.mkdir()
    shutil.move(data.tokenizer, tokenizers / f"fineweb_{VOCAB_SIZE}_bpe.model")
    return folder


def start(folder: Path, *arguments: str, **env: object) -> subprocess.Popen:
    """Run the launcher with this Python first on PATH and DATA_PATH relative to the folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {"PATH": path, "DATA_PATH": DATA, **env}
    environment = full_environment({name: str(value) for name, value in given.items()})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = ["bash", "run_8xh100.sh", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def launch(folder: Path, *arguments: str, **env: object) -> Result:
    process = start(folder, *arguments, **env)
    output = process.communicate()
    return Result(process.returncode, *output)


def test_seeds_are_trained_scored_summed_up_and_end_in_a_checked_records_folder(workplace):
    """What the user sets beats the profile."""
    arguments = "--name Two --author 'A. Name' --allow-commit"
    result = launch(workplace, SEEDS="7 8", RECORD_ARGS=arguments, RUN_ID="group", **TINY)
    assert result.code == 0, result.out + result.err
    for seed in (7, 8):
        log = (workplace / "logs" / f"group_seed{seed}.txt").read_text()
        lines = [line for line in log.splitlines() if line.startswith('{"event": ')]
        trained, scored = map(json.loads, lines)
        assert (trained["event"], scored["event"]) == ("train_summary", "eval_summary")
        assert trained["steps"] == 3
        assert f"= {trained['bytes_total']:,} of 16,000,000 bytes" in result.out
        assert f"{scored['val_bpb']:.4f}" in result.out
    (folder,) = (workplace / "records" / "track_non_record_16mb").iterdir()
    assert folder.name.endswith("_Two")
    submission = json.loads((folder / "submission.json").read_text())
    assert (submission["seeds"], submission["author"]) == ([7, 8], "A. Name")
    assert "| C1 causal |" in (folder / "README.md").read_text()
    assert "| script | nothing found | pass |" in result.out
    assert "FAIL" not in result.out


def test_two_nodes_train_one_model_through_torchruns_own_arguments(workplace):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    knobs = {**TINY, "GPTQ_BATCHES": 2, "RUN_ID": "nodes"}
    nodes = [start(workplace, f"--node_rank={rank}", *shared, **knobs) for rank in (0, 1)]
    outputs = [node.communicate() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    log = (workplace / "logs" / "nodes.txt").read_text()
    assert " world_size:2 " in log
    assert len(re.findall('^{"event": "train_summary"', log, re.MULTILINE)) == 1
    assert "val_bpb by sliding window" in outputs[0][0]
    assert "val_bpb by sliding window" not in outputs[1][0]


def test_a_signal_to_the_launcher_lets_the_training_save_and_the_same_command_goes_on(workplace):
    knobs = {**TINY, "RUN_ID": "signal", "CHECKPOINT_EVERY": 1000}
    process = start(workplace, **{**knobs, "ITERATIONS": 100_000})
    log = workplace / "logs" / "signal.txt"
    wait_for(lambda: log.exists() and "\nstep:3/" in log.read_text())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (143, "error: interrupted by signal 15")
    saved = re.search(r"checkpoint:logs/signal\.step(\d+)\.pt", out)
    assert "val_bpb by sliding window" not in out
    again = launch(workplace, **{**knobs, "ITERATIONS": int(saved[1]) + 1})
    assert again.code == 0, again.err
    assert f"resumed:logs/signal.step{saved[1]}.pt" in again.out
    assert "val_bpb by sliding window" in again.out


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ([], {"PROFILE": "fast"}, "PROFILE=fast: expected record, 1gpu, cpu or smoke"),
        ([], {"PROFILE": "smoke", "ROUTING": "zpif"}, "ROUTING='zpif': expected one of zipf "),
        ([], {"PROFILE": "smoke", "DATA_PATH": "nowhere"}, "DATA_PATH=nowhere: no such folder"),
        ([], {"PROFILE": "smoke", "SEEDS": "7"}, "not a clean commit"),
        (["--nnodes=2"], {"RUN_ID": ""}, "torchrun arguments need a RUN_ID"),
    ],
)
def test_a_stage_that_fails_ends_the_chain_with_its_line(workplace, arguments, env, message):
    result = launch(workplace, *arguments, **{"RUN_ID": "failed", **env})
    assert result.code == 2
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not list((workplace / "logs").glob("failed*.ptz"))


def test_shell_scripts_keep_to_bash_3_2_and_the_tools_of_a_mac():
    later = r"\b(mapfile|readarray|coproc|realpath|nproc)\b|(declare|local) -[An]|\$\{\w+(\^|,)"
    later += r"|&>>|\|&|readlink -f|sed -i|stat -c|date -d|=~ (?!\$\w+ )"
    assert re.search(later, "cores=$(nproc)")
    for path in (ROOT / "run_8xh100.sh", ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"):
        assert not re.search(later, path.read_text()), path

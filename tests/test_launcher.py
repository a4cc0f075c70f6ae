"""run_8xh100.sh end to end on a tiny data set, in a copy of the scripts."""

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
from helpers_cli import ROOT, VOCAB_SIZE, Result, full_environment, write_dataset

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
    command, pipe = ["bash", "run_8xh100.sh", *arguments], subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )


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
    table = result.out.split("| check |")[-1]
    assert "| script |" in table
    assert "FAIL" not in table


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
    log, until = workplace / "logs" / "signal.txt", time.perf_counter() + 60
    while not (log.exists() and "\nstep:3/" in log.read_text()):
        assert time.perf_counter() < until
        time.sleep(0.05)
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


LATER_THAN_BASH_3_2 = {  # or not in the tools of a Mac, each with a line that has it
    r"=~ (?!\$\w+ )": "[[ $name =~ _sp([0-9]+)$ ]]",
    r"\b(mapfile|readarray|coproc)\b": "mapfile -t lines",
    r"(declare|local) -[An]": "declare -A table",
    r"\$\{\w+(\^|,)": "echo ${name,,}",
    r"&>>|\|&": "make |& tee log",
    r"\b(realpath|nproc)\b|readlink -f|sed -i|stat -c|date -d": "cores=$(nproc)",
}


@pytest.mark.parametrize("pattern", LATER_THAN_BASH_3_2)
def test_shell_scripts_keep_to_what_a_mac_has(pattern):
    assert re.search(pattern, LATER_THAN_BASH_3_2[pattern])
    for path in (ROOT / "run_8xh100.sh", ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"):
        assert not re.search(pattern, path.read_text()), path

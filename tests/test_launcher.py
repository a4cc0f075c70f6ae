"""run_8xh100.sh end to end on a tiny data set, in a copy of the scripts.   python -m pytest tests/test_launcher.py"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_cli import ROOT, TINY_MODEL, full_environment, write_dataset

SCRIPTS = ("run_8xh100.sh", "train_gpt.py", "eval_sliding.py")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the scripts alone, and a data set in the challenge's layout beside them."""
    folder = tmp_path_factory.mktemp("launcher")
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    data = write_dataset(folder / "corpus" / "datasets" / f"fineweb10B_sp{TINY_MODEL['VOCAB_SIZE']}")
    (folder / "corpus" / "tokenizers").mkdir()
    shutil.move(data.tokenizer, folder / "corpus" / "tokenizers" / f"fineweb_{TINY_MODEL['VOCAB_SIZE']}_bpe.model")
    return folder


def launch(folder: Path, **env: object) -> subprocess.CompletedProcess:
    """`bash run_8xh100.sh` with this Python first on PATH and DATA_PATH relative to the folder."""
    data = f"corpus/datasets/fineweb10B_sp{TINY_MODEL['VOCAB_SIZE']}"
    base = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DATA_PATH": data}
    environment = full_environment(base | {name: str(value) for name, value in env.items()})
    return subprocess.run(["bash", "run_8xh100.sh"], cwd=folder, env=environment, capture_output=True, text=True)


def test_one_command_trains_exports_scores_and_sums_up(workplace):
    result = launch(workplace, PROFILE="smoke", ITERATIONS=3, RUN_ID="smoke")
    assert result.returncode == 0, result.stderr
    log = (workplace / "logs" / "smoke.txt").read_text()
    events = [json.loads(line) for line in log.splitlines() if line.startswith('{"event": ')]
    assert [event["event"] for event in events] == ["train_summary", "eval_summary"]
    assert events[0]["steps"] == 3, "the user's ITERATIONS beats the profile's"
    assert events[0]["bytes_model"] == (workplace / "logs" / "smoke.ptz").stat().st_size
    summary = result.stdout.splitlines()[-6:]
    assert summary[0].split() == ["val_bpb", "before", "quantization", f"{events[0]['val_bpb_float']:.4f}"]
    assert f"{events[1]['val_bpb']:.4f}" in summary[2]
    assert f"= {events[0]['bytes_total']:,} of 16,000,000 bytes" in summary[3]


ROUTINGS = "zipf cluster hash modulo learned hybrid soft dense"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PROFILE": "fast"}, "error: PROFILE=fast: expected record, 1gpu, cpu or smoke"),
        ({"PROFILE": "smoke", "ROUTING": "zpif"}, f"error: ROUTING='zpif': expected one of {ROUTINGS}"),
        ({"PROFILE": "smoke", "DATA_PATH": "nowhere"}, "error: DATA_PATH=nowhere: no such folder"),
    ],
)
def test_a_stage_that_fails_ends_the_chain_with_its_line(workplace, env, message):
    result = launch(workplace, RUN_ID="failed", **env)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == message
    assert not (workplace / "logs" / "failed.ptz").exists()

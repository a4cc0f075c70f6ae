"""Training on 1 and on 2 gloo ranks is one training: weights, losses, artifact."""

import hashlib
from pathlib import Path

import pytest
from helpers_cli import Dataset, cli_env, train_losses
from helpers_faults import Outcome, run_ranks

import train_gpt

STEPS = 20
TOLERANCE = 2e-5  # nats, of each loss; sums in another order differ by 1e-6 after 20 steps
pytestmark = pytest.mark.slow


def main() -> None:
    """Train by train_gpt.py and print a digest of this rank's averaged weights."""
    true_train = train_gpt.train

    def train(hp, dist, log, model, *args):
        end = true_train(hp, dist, log, model, *args)
        weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
        print(f"weights:{hashlib.sha256(weights).hexdigest()}", flush=True)
        return end

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "train", train)
        train_gpt.main()


def trained(dataset: Dataset, folder: Path, world_size: int, **knobs: object) -> Outcome:
    """Run `main` on every rank."""
    folder.mkdir()
    every = {"ITERATIONS": STEPS, "TARGET_BYTES": 0, "LOOP_FROM": 0.3, "VAL_MAX_TOKENS": 200}
    env = cli_env(dataset, **every, **knobs)
    outcome = run_ranks("test_distributed", env, folder, world_size=world_size)
    assert outcome.codes == [0] * world_size, outcome.err
    return outcome


def digest(out: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith("weights:")]
    return line


@pytest.mark.parametrize("form", [{}, {"DISPATCH": "grouped"}], ids=str)
def test_both_ranks_have_one_model_and_the_losses_of_one_rank(form, dataset, tmp_path):
    alone = train_losses(trained(dataset, tmp_path / "1", 1, **form).out[0])
    assert len(alone) == STEPS
    assert alone[0] - alone[-1] > 0.3
    both = trained(dataset, tmp_path / "2", 2, **form)
    first, second = both.out
    assert train_losses(first) == pytest.approx(alone, abs=TOLERANCE)
    assert digest(first) == digest(second)
    assert second == f"{digest(second)}\n", "the first rank alone speaks"
    assert "world_size:2" in first
    assert "layer_loop:enabled step:6 " in first
    assert both.files == ["run.ptz", "run.txt"]

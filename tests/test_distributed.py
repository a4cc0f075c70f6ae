"""Training on 1 and on 2 gloo ranks is one training: weights, losses, artifact.

Both worlds are processes of one fork server that imports torch once, and train all CASES in turn by
main() of train_gpt.py. Two cases plant a fault that the comparisons have to notice.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from helpers_cli import PACK_ONCE, Dataset, cli_env, full_environment, train_losses, write_dataset

import train_gpt

STEPS = 20
WORLDS = (1, 2)
FORMS = {"masked": {}, "grouped": {"DISPATCH": "grouped"}, "dense": {"ROUTING": "dense"}}
FAULTS = ("rank_after", "rank_before")  # gradients differ by rank after, or before their mean
CASES = (*FORMS, *FAULTS)
TOLERANCE = 2e-5  # nats, of each loss; sums in another order differ by 1e-6 after 20 steps
pytestmark = pytest.mark.slow


class FaultyGradients(train_gpt.Gradients):
    """Gradients that depend on the rank."""

    fault = ""

    def average_and_clip(self, max_norm: float) -> None:
        if self.fault == "rank_before" and self.dist.rank == 1:
            self.flat[64:].zero_()
        super().average_and_clip(max_norm)
        if self.fault == "rank_after":
            self.flat[64:].mul_(1 + 1e-6 * self.dist.rank)


class Enough(Exception):
    """Ends a case with a fault after its training."""


def train_case(dist: train_gpt.Dist, case: str, folder: Path, env: dict[str, str]) -> dict:
    """Train by main(). Returns a digest of this rank's averaged weights, and the files written."""
    found: dict = {"files": []}
    true_train, true_write = train_gpt.train, train_gpt.write_atomically

    def record_train(hp, dist, log, model, *args):
        end = true_train(hp, dist, log, model, *args)
        tensors = model.state_dict().values()
        weights = b"".join(tensor.numpy().tobytes() for tensor in tensors)
        found["weights"] = hashlib.sha256(weights).hexdigest()
        if case in FAULTS:
            raise Enough
        return end

    def record_write(path: Path, data: bytes) -> None:
        found["files"].append(path.name)
        true_write(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Dist, "from_torchrun", lambda: dist)  # a group is joined only once
        patch.setattr(train_gpt, "train", record_train)
        patch.setattr(train_gpt, "write_atomically", record_write)
        patch.setattr(train_gpt, "pack_source", PACK_ONCE)
        patch.setattr(train_gpt, "Gradients", FaultyGradients)
        patch.setattr(FaultyGradients, "fault", case)
        patch.setattr(os, "environ", env)
        patch.setattr("sys.argv", ["train_gpt.py"])
        patch.chdir(folder)
        with contextlib.suppress(Enough):
            train_gpt.main()
    return found


def be_rank(rank: int, world_size: int, port: int, folder: Path, dataset: Dataset) -> None:
    """Train all cases and leave what was found in `folder`; runs in a process of its own."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", CUDA_VISIBLE_DEVICES="")
    dist = train_gpt.Dist.from_torchrun()
    knobs = {"ITERATIONS": STEPS, "TARGET_BYTES": 0, "LOOP_FROM": 0.3, "VAL_MAX_TOKENS": 200}
    found = {}
    for case in CASES if world_size > 1 else FORMS:
        work = folder / case
        work.mkdir(exist_ok=True)
        env = cli_env(dataset, **knobs, **FORMS.get(case, {}), RUN_ID=case)
        found[case] = train_case(dist, case, work, full_environment(env))
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.all_max(0.0)  # none leaves while another still needs it
    os._exit(0)  # gloo's threads may abort an interpreter that shuts down


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, list[dict]]:
    """What every rank of every world found, by world size and rank."""
    dataset = write_dataset(tmp_path_factory.mktemp("data") / "set")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "pytest", "sentencepiece"])
    found = {}
    for world_size in WORLDS:
        folder = tmp_path_factory.mktemp(f"world{world_size}")
        port = free_port()
        ranks = []
        for rank in range(world_size):
            arguments = (rank, world_size, port, folder, dataset)
            ranks.append(context.Process(target=be_rank, args=arguments))
            ranks[rank].start()
        for process in ranks:
            process.join(timeout=100)
        assert [process.exitcode for process in ranks] == [0] * world_size
        found[world_size] = []
        for rank in range(world_size):
            found[world_size].append(json.loads((folder / f"rank{rank}.json").read_text()))
        for case, result in found[world_size][0].items():
            result["log"] = (folder / case / "logs" / f"{case}.txt").read_text(encoding="utf-8")
            result["losses"] = train_losses(result["log"])
    return found


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_both_ranks_have_one_model_and_the_losses_of_one_rank(worlds, form):
    first, second = worlds[2]
    assert first[form]["weights"] == second[form]["weights"]
    alone = worlds[1][0][form]["losses"]
    assert len(alone) == STEPS
    assert alone[0] - alone[-1] > 0.3
    assert worst(alone, first[form]["losses"]) < TOLERANCE


def test_gradients_that_differ_between_ranks_are_noticed(worlds):
    """By a millionth after the mean; or a rank's are lost before it."""
    first, second = worlds[2]
    assert first["rank_after"]["weights"] != second["rank_after"]["weights"]
    assert first["rank_before"]["weights"] == second["rank_before"]["weights"]
    alone = worlds[1][0]["masked"]["losses"]
    assert worst(alone, first["rank_before"]["losses"]) > 100 * TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_the_first_rank_alone_writes_the_artifact_and_once(worlds, form):
    first, second = worlds[2]
    assert first[form]["files"] == [f"{form}.ptz"]
    assert second[form]["files"] == []
    text = first[form]["log"].split("=" * 100)[-1]
    assert text.count('{"event": "train_summary"') == 1
    assert "world_size:2" in text
    assert "layer_loop:enabled step:6 " in text


def test_both_dispatches_are_one_training_and_dense_is_another(worlds):
    masked, grouped, dense = (worlds[1][0][form]["losses"] for form in FORMS)
    assert worst(masked, grouped) < TOLERANCE < worst(masked, dense) / 100

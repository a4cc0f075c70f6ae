"""Training on 1, 2 and 4 gloo ranks is one training: weights, losses, artifact.   pytest tests/test_distributed.py

Every world is started once, as processes of one fork server that imports torch once, and trains all CASES in turn by
main() of train_gpt.py. A case may plant a fault that the comparisons have to notice.
"""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from helpers_cli import Dataset, cli_env, full_environment, write_dataset

import train_gpt

STEPS = 20
WORLDS = (1, 2, 4)
FORMS = {
    "masked": {"ROUTING": "zipf", "DISPATCH": "masked"},
    "grouped": {"ROUTING": "zipf", "DISPATCH": "grouped"},
    "dense": {"ROUTING": "dense"},
}
FAULTS = (
    "rank_after",
    "rank_before",
)  # a gradient that depends on the rank, after and before the ranks' mean
CASES = {**FORMS, **dict.fromkeys(FAULTS, FORMS["masked"])}
TOLERANCE = 2e-5  # nats, of each loss; sums in another order differ by 1e-6 after 20 steps


PACK_ONCE = functools.cache(train_gpt.pack_source)  # the code is the same in all cases


class Enough(Exception):
    """Ends a case with a fault after its training."""


def plant(fault: str, patch: pytest.MonkeyPatch) -> None:
    average = train_gpt.Gradients.average_and_clip

    def rank_dependent(gradients: train_gpt.Gradients, max_norm: float) -> None:
        if fault == "rank_before" and gradients.dist.rank == 1:
            gradients.flat[64:].zero_()
        average(gradients, max_norm)
        if fault == "rank_after":
            gradients.flat[64:].mul_(1 + 1e-6 * gradients.dist.rank)

    if fault in FAULTS:
        patch.setattr(train_gpt.Gradients, "average_and_clip", rank_dependent)


def train_case(dist: train_gpt.Dist, case: str, folder: Path, env: dict[str, str]) -> dict:
    """One training by main(): the losses, digests of this rank's weights and average, and what files it wrote."""
    found: dict = {"losses": [], "files": []}
    step, train, write = train_gpt.train_step, train_gpt.train, train_gpt.write_atomically

    def record_step(model, *args) -> torch.Tensor:
        loss = step(model, *args)
        found["losses"].append(loss.item())
        found["weights"] = digest(model.state_dict())
        return loss

    def record_train(hp, dist, log, model, *args) -> tuple[int, float]:
        result = train(hp, dist, log, model, *args)
        found["average"] = digest(model.state_dict())
        if case in FAULTS:
            raise Enough
        return result

    def record_write(path: Path, data: bytes) -> None:
        found["files"].append(path.name)
        write(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_gpt.Dist, "from_torchrun", lambda device: dist
        )  # a process joins a group only once
        patch.setattr(train_gpt, "train_step", record_step)
        patch.setattr(train_gpt, "train", record_train)
        patch.setattr(train_gpt, "write_atomically", record_write)
        patch.setattr(os, "environ", env)
        patch.setattr("sys.argv", ["train_gpt.py"])
        patch.chdir(folder)
        patch.setattr(train_gpt, "pack_source", PACK_ONCE)
        plant(case, patch)
        with contextlib.suppress(Enough):
            train_gpt.main()
    return found


def digest(state: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(
        b"".join(tensor.numpy().tobytes() for tensor in state.values())
    ).hexdigest()


def be_rank(rank: int, world_size: int, port: int, folder: Path, dataset: Dataset) -> None:
    """Train all cases and leave what was found in `folder`; runs in a process of its own."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()})
    dist, found = train_gpt.Dist.from_torchrun("cpu"), {}
    knobs = {"ITERATIONS": STEPS, "TARGET_BYTES": 0, "LOOP_FROM": 0.3, "VAL_MAX_TOKENS": 200}
    for case, changes in (CASES if world_size > 1 else FORMS).items():
        work = folder / case
        work.mkdir(exist_ok=True)
        env = full_environment(cli_env(dataset, **knobs, **changes, RUN_ID=case))
        found[case] = train_case(dist, case, work, env)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.all_max(0.0)  # none leaves while another still needs it
    os._exit(
        0
    )  # as run_entry_point() of train_gpt.py does: gloo's threads may abort an interpreter that shuts down


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, list[dict]]:
    """What every rank of every world found, by world size and rank; rank 0 also has the `folder` of its world."""
    dataset, context = (
        write_dataset(tmp_path_factory.mktemp("data") / "set"),
        multiprocessing.get_context("forkserver"),
    )
    context.set_forkserver_preload(["torch._dynamo", "pytest", "sentencepiece"])
    found = {}
    for world_size in WORLDS:
        folder, port = tmp_path_factory.mktemp(f"world{world_size}"), free_port()
        arguments = [(rank, world_size, port, folder, dataset) for rank in range(world_size)]
        ranks = [context.Process(target=be_rank, args=each) for each in arguments]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=100)
        assert [process.exitcode for process in ranks] == [0] * world_size
        found[world_size] = [
            json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)
        ]
        found[world_size][0]["folder"] = str(folder)
    return found


def worst(ours: list[float], theirs: list[float]) -> float:
    assert len(ours) == len(theirs) > 0
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_after_twenty_steps_all_ranks_have_the_same_weights_bit_for_bit(worlds, form, world_size):
    for what in ("weights", "average", "losses"):
        assert len({str(rank[form][what]) for rank in worlds[world_size]}) == 1
    assert len(worlds[world_size][0][form]["losses"]) == STEPS
    assert worlds[world_size][0][form]["weights"] != worlds[world_size][0][form]["average"]


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_a_gradient_that_differs_by_a_millionth_between_ranks_is_noticed(worlds, world_size):
    for what in ("weights", "average"):
        assert len({rank["rank_after"][what] for rank in worlds[world_size]}) == world_size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_losses_do_not_depend_on_the_number_of_ranks(worlds, form, world_size):
    alone, together = (worlds[size][0][form]["losses"] for size in (1, world_size))
    assert alone[0] - alone[-1] > 0.3
    assert worst(alone, together) < TOLERANCE


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_the_gradients_of_a_rank_that_are_lost_before_the_mean_show_in_the_losses(
    worlds, world_size
):
    alone, together = (
        worlds[1][0]["masked"]["losses"],
        worlds[world_size][0]["rank_before"]["losses"],
    )
    assert worst(alone, together) > 100 * TOLERANCE
    assert len({rank["rank_before"]["weights"] for rank in worlds[world_size]}) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_first_rank_alone_writes_the_artifact_and_once(worlds, form, world_size):
    first, *others = (rank[form]["files"] for rank in worlds[world_size])
    assert first == [f"{form}.ptz"]
    assert others == [[]] * (world_size - 1)
    logs = Path(worlds[world_size][0]["folder"], form, "logs")
    assert sorted(path.name for path in logs.iterdir()) == [f"{form}.ptz", f"{form}.txt"]
    text = (logs / f"{form}.txt").read_text(encoding="utf-8").split("=" * 100)[-1]
    assert text.count('{"event": "train_summary"') == 1
    assert f"world_size:{world_size}" in text
    assert "layer_loop:enabled step:6 " in text


def test_both_dispatches_are_one_training_and_dense_is_another(worlds):
    masked, grouped, dense = (worlds[1][0][form]["losses"] for form in FORMS)
    assert worst(masked, grouped) < TOLERANCE < worst(masked, dense) / 100

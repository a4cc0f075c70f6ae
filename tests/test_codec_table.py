"""Properties of records/codec_table.py on a tiny trained artifact.   pytest tests/test_codec_table.py"""

import re
from pathlib import Path

import codec_table
import pytest
import torch
from helpers_cli import ALONE, assert_refused, cli_env, run_command, run_in_process, write_dataset

import train_gpt

ORDERS = [
    f"{codec} {order}"
    for codec in ("zstd-22", "brotli-11")
    for order in ("row", "column", "sorted")
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, dataset) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    result = run_in_process(train_gpt.main, cli_env(dataset, CHECKPOINT_EVERY=5), folder)
    assert result.code == 0, result.err
    return folder / "logs" / "run.ptz"


def table(artifact: Path, dataset, **knobs) -> dict[str, dict[str, float]]:
    """Rows of the printed table, by what they are of and by column."""
    result = run_in_process(codec_table.main, cli_env(dataset, **knobs), artifact.parent, artifact)
    assert (result.code, result.err) == (0, "")
    header, rule, *rows = result.out.splitlines()
    assert header == f"| tensors | weights | entropy | {' | '.join(ORDERS)} |"
    assert rule == "|" + "---|" * 9
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    columns = ["weights", "entropy", *ORDERS]
    return {
        name: dict(zip(columns, (float(value.replace(",", "")) for value in values), strict=True))
        for name, *values in cells
    }


def test_the_table_covers_every_matrix_once_and_its_total_is_the_sum_of_the_roles(
    artifact, dataset
):
    rows = table(artifact, dataset)
    model, _, _ = train_gpt.load_artifact(
        artifact, train_gpt.Hyperparameters(eval_stride=8), ALONE.device
    )
    weights = dict.fromkeys(("embedding", "matrix", "expert"), 0)
    for name, tensor in model.state_dict().items():
        if train_gpt.role_of(name) in weights:
            weights[train_gpt.role_of(name)] += tensor.numel()
    total = rows.pop("all")
    assert {role: row["weights"] for role, row in rows.items()} == weights
    assert total["weights"] == sum(weights.values())
    for column in ("entropy", *ORDERS):
        bits = sum(row[column] * row["weights"] for row in rows.values())
        assert total[column] == pytest.approx(bits / total["weights"], abs=1.1e-3)


def test_bits_per_weight_are_those_of_int6_and_int7_symbols_and_fewer_with_fewer_bits(
    artifact, dataset
):
    rows, coarse = (
        table(artifact, dataset, MATRIX_CLIP=12.85, MATRIX_BITS=bits) for bits in (6, 3)
    )
    for role, row in rows.items():
        assert 0 < row["entropy"] < (7 if role in ("embedding", "all") else 6)
        assert all(0 < row[order] <= 8.5 for order in ORDERS)
    assert rows["matrix"]["entropy"] > coarse["matrix"]["entropy"] + 1
    assert rows["embedding"] == coarse["embedding"]


@pytest.mark.parametrize("average", ["ema", "off"])
def test_the_weights_are_those_that_the_run_exports(average, dataset, tmp_path):
    result = run_in_process(
        train_gpt.main, cli_env(dataset, CHECKPOINT_EVERY=5, AVERAGE=average), tmp_path
    )
    assert result.code == 0, result.err
    older, newest = sorted((tmp_path / "logs").glob("run.step*.npz"))
    weights, before = codec_table.averaged_weights(newest), codec_table.averaged_weights(older)
    hp = train_gpt.Hyperparameters(eval_stride=8)
    model, _, _ = train_gpt.load_artifact(tmp_path / "logs" / "run.ptz", hp, ALONE.device)
    assert weights.keys() == model.state_dict().keys()
    exported = model.tok_emb.weight
    error = (weights["tok_emb.weight"] - exported).norm()
    assert 0 < error < 0.5 * (before["tok_emb.weight"] - exported).norm()


def test_a_permutation_is_paid_for():
    symbols = torch.arange(12, dtype=torch.int8).view(3, 4).numpy()
    stored = codec_table.orders(symbols)
    assert {name: extra for name, (_, extra) in stored.items()} == {
        "row": 0,
        "column": 0,
        "sorted": 2 * 4,
    }
    assert [stored[name][0].tobytes() for name in ("row", "column")] == [
        symbols.tobytes(),
        symbols.T.tobytes(),
    ]
    assert sorted(map(tuple, stored["sorted"][0])) == sorted(map(tuple, symbols.T))
    assert stored["sorted"][0][0].tolist() == [3, 7, 11]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["other.ptz"], r"other\.ptz: no such artifact"),
        (["copy.ptz"], r"copy\.step\*\.npz: no checkpoint \(CHECKPOINT_EVERY\)"),
        ([], r"usage: "),
        (["run.ptz", "copy.ptz"], r"usage: "),
    ],
)
def test_missing_files_and_arguments_are_refused_in_one_line(names, expected, artifact, dataset):
    artifact.with_name("copy.ptz").write_bytes(artifact.read_bytes())
    paths = [artifact.with_name(name) for name in names]
    result = run_in_process(codec_table.main, cli_env(dataset), artifact.parent, *paths)
    assert_refused(result)
    assert re.search(expected, result.err)


def test_help_by_the_command_line_shows_an_example(dataset, tmp_path):
    result = run_command("records/codec_table.py", cli_env(dataset), tmp_path, "--help")
    assert (result.code, result.err) == (0, "")
    assert "python records/codec_table.py logs/x.ptz" in result.out

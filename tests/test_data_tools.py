"""data/tokenize_docs.py and data/make_sample.py.   pytest tests/test_data_tools.py"""

import bz2
import gzip
import json
import lzma
import os
import random
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import make_sample
import numpy as np
import pytest
import sentencepiece
import tokenize_docs
import zstandard
from helpers_cli import Result, assert_refused, make_sentences, run_in_process

import train_gpt
from train_gpt import BOS_ID, load_data_shard

COMPRESS = {
    ".bz2": bz2.compress,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    texts = make_sentences(1, 120)
    texts[3] = "  Caf\u00e9\u00a0na\u00efve\t\u2460 \ufb01ne\r\n\r\n  12345 tokens \U0001f600  "
    texts[4] = "x" * 5000 + " " + texts[4]
    return texts


@pytest.fixture(scope="module")
def model(documents) -> bytes:
    return tokenize_docs.train_tokenizer(documents, 400)


@pytest.fixture
def model_path(model, tmp_path) -> Path:
    path = tmp_path / "tiny.model"
    path.write_bytes(model)
    return path


@pytest.fixture
def train(documents, tmp_path) -> Path:
    return write_jsonl(tmp_path / "train.jsonl", documents)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)]
    path.write_bytes(COMPRESS.get(path.suffix.lower(), bytes)("".join(lines).encode()))
    return path


def run(output: Path, *argv: object) -> Result:
    """Tokenize into the data set "set", with 5 validation documents if nothing else is asked."""
    val = [] if {"--val", "--num-val-docs"} & {*argv} else ["--num-val-docs", 5]
    argv = ("--output", output, "--name", "set", *val, *argv)
    return run_in_process(tokenize_docs.main, {}, output.parent, *argv)


def made(output: Path, *argv: object) -> Path:
    """Return the folder of shards of a run that succeeds."""
    result = run(output, *argv)
    assert (result.code, result.err) == (0, "")
    return output / "datasets" / "set"


def final_files(folder: Path) -> dict[Path, bytes]:
    """Return the files that a user or a trainer would take for results."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".bin", ".model", ".json")]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def refused(output: Path, said: str, *argv: object) -> None:
    """Check that a run is refused in one line and leaves no file behind."""
    before = final_files(output)
    assert_refused(run(output, *argv), said)
    assert final_files(output) == before
    assert not list(output.rglob("*.partial"))


def decoded(folder: Path, split: str, model_path: Path) -> list[str]:
    """Return the text of every document of a split, which begins with BOS."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    paths = sorted(folder.glob(f"fineweb_{split}_*"))
    tokens = np.concatenate([load_data_shard(path) for path in paths])
    assert tokens[0] == BOS_ID
    parts = np.split(tokens, np.flatnonzero(tokens == BOS_ID)[1:])
    return [tokenizer.decode(part[1:].tolist()) for part in parts]


def normalised(texts: list[str]) -> list[str]:
    return [" ".join(unicodedata.normalize("NFKC", text).split()) for text in texts]


# ---- Shards, tokenizer and manifest


def test_shards_decode_to_the_normalised_documents_in_order(documents, model, model_path, tmp_path):
    """Also where a document begins in one shard and ends in another."""
    train = write_jsonl(tmp_path / "train.jsonl", [*documents[10:], "", " \n "])
    val = write_jsonl(tmp_path / "val.jsonl", documents[:10])
    inputs = ("--train", train, "--val", val, "--tokenizer", model_path)
    result = run(tmp_path, *inputs, "--shard-tokens", 97)
    folder = tmp_path / "datasets" / "set"
    assert decoded(folder, "val", model_path) == normalised(documents[:10])
    assert decoded(folder, "train", model_path) == normalised(documents[10:])
    *full, last = [np.fromfile(path, "<i4", 256) for path in sorted(folder.glob("*_train_*"))]
    assert all(header[:3].tolist() == [20240520, 1, 97] for header in full)
    assert 0 < last[2] <= 97
    assert not last[3:].any()
    names = {f"fineweb_train_{i:06d}.bin" for i in range(len(full) + 1)}
    assert {path.name for path in folder.glob("*_train_*")} == names
    assert (tmp_path / "tokenizers" / "tiny.model").read_bytes() == model
    assert "train: 110 docs, " in result.out
    assert "2 empty ones skipped" in result.out
    assert f"{sum(len(text.encode()) for text in documents[:10]):,} bytes" in result.out


def test_a_document_of_validation_is_left_out_of_training_and_found_there(
    documents, model_path, tmp_path
):
    """However its white space is, and wherever it ends: these shards are shorter than one."""
    val, own = documents[:5], documents[5:30]
    again = [val[2], val[4].replace(" ", " \n "), val[2]]
    train = write_jsonl(tmp_path / "train.jsonl", val + own[:20] + again + own[20:])
    argv = ("--train", train, "--tokenizer", model_path, "--shard-tokens", 97)
    assert ", 3 left out that validation has" in run(tmp_path, *argv).out
    folder = tmp_path / "datasets" / "set"
    assert decoded(folder, "val", model_path) == normalised(val)
    assert decoded(folder, "train", model_path) == normalised(own)
    good = run_in_process(tokenize_docs.main, {}, tmp_path, "--verify", folder)
    assert "25 training and 5 different validation documents, none in both splits" in good.out
    count = len(list(folder.glob("fineweb_train_*.bin")))
    for number, path in enumerate(sorted(folder.glob("fineweb_val_*.bin")), count):
        (folder / f"fineweb_train_{number:06d}.bin").write_bytes(path.read_bytes())
    bad = run_in_process(tokenize_docs.main, {}, tmp_path, "--verify", folder)
    assert_refused(bad, "training document 26 is in validation, too")


def test_all_input_forms_give_identical_shards(documents, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_docs, "CHUNK_BYTES", 1000)  # less than one of the lines
    texts = [*documents[:29], random.Random(7).randbytes(4_000).hex()]
    inputs = {"plain": [write_jsonl(tmp_path / "train.jsonl", texts)]}
    for suffix in COMPRESS:
        halves = [write_jsonl(tmp_path / f"a.jsonl{suffix}", texts[:15])]
        halves.append(write_jsonl(tmp_path / f"b.jsonl{suffix}", texts[15:]))
        frames = tmp_path / f"frames.jsonl{suffix}"
        padding = b"\0" * 8  # which their formats allow
        frames.write_bytes(padding.join(half.read_bytes() for half in halves))
        inputs |= {f"two files {suffix}": halves, f"two frames {suffix}": [frames]}
    windows, folder = tmp_path / "WINDOWS.JSONL", tmp_path / "folder"
    inputs |= {"windows": [windows], "folder": [folder]}
    lines = inputs["plain"][0].read_bytes().replace(b"\n", b"\r\n\r\n").rstrip()
    windows.write_bytes(b"\xef\xbb\xbf" + lines)
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03d}{'.txt' if i % 2 else '.md'}").write_bytes(text.encode())
    (folder / "ignored.py").write_text("not a document")
    val = write_jsonl(tmp_path / "val.jsonl", documents[30:35])
    shards = {}
    for form, paths in inputs.items():
        argv = ("--train", *paths, "--val", val, "--tokenizer", model_path)
        path = made(tmp_path / f"out {form}", *argv) / "fineweb_train_000000.bin"
        shards[form] = path.read_bytes()
    assert len(shards["plain"]) > 1024 + 2 * len(texts)
    assert [form for form, data in shards.items() if data != shards["plain"]] == []


def test_a_trained_tokenizer_knows_the_training_split_only(documents, tmp_path):
    train_texts = [f"{text} \u00f6\u00f6\u00f6" for text in documents[20:]]
    val_texts = [f"{text} \u0416\u0416\u0416" for text in documents[:20]]
    both = write_jsonl(tmp_path / "all.jsonl", val_texts + train_texts)
    made(tmp_path, "--train", both, "--num-val-docs", 20, "--train-tokenizer", 400)
    model = (tmp_path / "tokenizers" / "set_bpe.model").read_bytes()
    assert model == tokenize_docs.train_tokenizer(train_texts, 400)


def test_a_trained_tokenizer_has_the_challenge_settings(model):
    tokenizer = tokenize_docs.load_tokenizer(model, "tiny")
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    assert len(pieces) == 400
    assert sum(map(tokenizer.is_byte, range(400))) == 256
    assert tokenizer.encode("12 12", out_type=str) == list("12\u258112")
    assert not tokenizer.encode("tokens", out_type=str)[0].startswith("\u2581")
    assert "xxxx" in "".join(pieces), "a document over 4,192 bytes was dropped"


# ---- What is refused

BAD_LINES = {
    b'{"text": "a"}\n{"text": "b"\n': 'bad.jsonl:2: no "text" in UTF-8: JSONDecodeError: ',
    b'{"text": "a"}\n\n["text"]\n': 'bad.jsonl:3: no "text" in UTF-8: TypeError: ',
    b'{"text": 5}\n': 'bad.jsonl:1: no "text" in UTF-8: AttributeError: ',
    b'{"text": "caf\xe9"}\n': 'bad.jsonl:1: no "text" in UTF-8: UnicodeDecodeError: ',
    b'{"text": "\\ud800"}\n': 'bad.jsonl:1: no "text" in UTF-8: UnicodeEncodeError: ',
    b"[" * 100_000 + b"\n": 'bad.jsonl:1: no "text" in UTF-8: RecursionError: ',
    b'{"text": ""}\n{"text": " "}\n': "the train split has no document",
}


def test_bad_documents_are_refused_by_file_and_line(train, model_path, tmp_path):
    for data, expected in BAD_LINES.items():
        (tmp_path / "bad.jsonl").write_bytes(data)
        inputs = ("--train", tmp_path / "bad.jsonl", "--val", train)
        refused(tmp_path / "out", expected, *inputs, "--tokenizer", model_path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_truncated_and_damaged_compressed_files_are_refused(
    suffix, documents, model_path, tmp_path
):
    whole = write_jsonl(tmp_path / f"train.jsonl{suffix}", documents)
    data = whole.read_bytes()
    truncated = [data[: len(data) // 2], data[:-1], data + data[:-1]]
    damaged = [b"not compressed at all", data + b"junk", data + b"x" + data[1:]]
    for content in (*truncated, *damaged):
        whole.write_bytes(content)
        said = "it is truncated" if content in truncated else f"damaged {suffix} file: "
        refused(tmp_path / "out", said, "--train", whole, "--tokenizer", model_path)


def test_missing_empty_and_wrong_inputs_are_refused(train, model_path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.csv", "a.Parquet"):
        (tmp_path / name).touch()
    model = ("--tokenizer", model_path)
    without_space = tmp_path / "snowman.model"
    data = model_path.read_bytes().replace(b"\x03\xe2\x96\x81", b"\x03\xe2\x98\x83")
    without_space.write_bytes(data)  # another piece in the place of U+2581
    cases = {
        "snowman.model: no piece for a space": ("--train", train, "--tokenizer", without_space),
        "a.model: not a SentencePiece model": ("--train", train, "--tokenizer", tmp_path / "a.csv"),
        "missing.jsonl": ("--train", tmp_path / "missing.jsonl", *model),
        "gone.model": ("--train", train, "--tokenizer", tmp_path / "gone.model"),
        "a.csv: no .jsonl (or .jsonl.bz2, .gz, .xz, .zst), .parquet": (
            "--train",
            tmp_path / "a.csv",
            *model,
        ),
        "pyarrow": ("--train", tmp_path / "a.Parquet", *model),
        "train split": ("--train", train, "--num-val-docs", 120, *model),
        "no document of its own": ("--train", train, "--val", train, *model),
        "Vocabulary size": ("--train", train, "--train-tokenizer", 30_000),
        "plain folder": ("--train", train, *model, "--name", "../up"),
    }
    for expected, argv in cases.items():
        refused(tmp_path / "out", expected, *argv)


def test_an_interrupted_run_leaves_nothing(train, model_path, tmp_path, monkeypatch):
    descriptors = []

    def interrupted(descriptor):
        descriptors.append(descriptor)
        if len(descriptors) == 4:  # of the training shards
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    argv = ("--train", train, "--tokenizer", model_path, "--shard-tokens", 300)
    assert run(tmp_path / "new", *argv).code == 130
    assert final_files(tmp_path / "new") == {}


def test_what_is_there_is_never_replaced(train, model_path, tmp_path):
    """That the counts of the manifest are true, --verify checks below."""
    argv = ("--train", train, "--tokenizer", model_path)
    made(tmp_path, *argv)
    refused(tmp_path, "set is there already; delete it", *argv)
    made(tmp_path, *argv, "--name", "two")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["datasets"]] == ["set", "two"]
    assert [entry["name"] for entry in manifest["tokenizers"]] == ["tiny"]
    assert manifest["datasets"][0]["stats"]["docs_train"] == 115
    (tmp_path / "manifest.json").write_text("[]")
    refused(tmp_path, "manifest.json: not a manifest", *argv, "--name", "other")
    (tmp_path / "tokenizers" / "tiny.model").write_bytes(b"precious")
    refused(tmp_path, "another tokenizer", *argv, "--name", "other")


def test_a_reader_that_has_left_is_no_error(train, model_path, tmp_path, monkeypatch):
    """As `| head` does; the end of the process flushes once more."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    argv = ["--train", train, "--tokenizer", model_path, "--output", tmp_path, "--name", "set"]
    with os.fdopen(write_end, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        tokenize_docs.main([*map(str, argv), "--num-val-docs", "5"])
        nobody.flush()
    assert (tmp_path / "manifest.json").exists()


# ---- The sample

# Modules that go to validation, in every process, and some that go to training.
CLEAN, PARTLY = "part003", "part004"
BEGUN, TWIN, TWICE = "part010", "part011", "part012"


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """Return four docstrings for each of a hundred modules, three of which repeat others."""
    texts = {f"part{i:03d}": make_sentences(i, 4) for i in range(100)}
    texts[TWIN] = [*texts[TWICE], "only here: " + texts[TWIN][0]]
    begins = texts[BEGUN][0].split()[:20]
    texts[PARTLY][0] = " ".join(begins + texts[PARTLY][0].split()[20:])
    return texts


@pytest.fixture(scope="module")
def sample(texts, tmp_path_factory) -> Iterator[Path]:
    """Make the sample of a package that is found, but cannot be imported."""
    root = tmp_path_factory.mktemp("site") / "fakepkg"
    root.mkdir()
    (root / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    (root / "template.py").write_text("this is {{ not }} Python")
    for name, (module, *functions) in texts.items():
        body = [f'"""{module}"""']
        body += [f'def f{i}():\n    """{text}\n    """' for i, text in enumerate(functions)]
        (root / f"{name}.py").write_text("\n".join(body) + "\n")
    output = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root.parent))
        make_sample.make_sample(output, ["fakepkg"])
        yield output


def test_no_text_of_the_sample_is_in_two_documents_or_in_both_splits(sample, texts):
    folder = sample / "datasets" / "sample_sp1024"
    model = sample / "tokenizers" / "sample_1024_bpe.model"
    train, val = ("\n".join(decoded(folder, split, model)) for split in ("train", "val"))
    assert texts[CLEAN][0] in val
    assert texts[PARTLY][1] not in val
    assert train.count(texts[BEGUN][0]) == train.count(texts[TWICE][0]) == 1
    assert "only here" in train


def test_the_sample_is_made_once_and_the_same_in_another_place(sample, tmp_path, capsys):
    folder = sample / "datasets" / "sample_sp1024"
    hp = train_gpt.Hyperparameters().override(data_path=str(folder), vocab_size=1024)
    assert train_gpt.load_tokenizer(hp)[0].vocab_size() == 1024  # it is found beside the shards
    make_sample.make_sample(sample, ["fakepkg"])
    assert "nothing to do" in capsys.readouterr().out
    make_sample.make_sample(tmp_path / "again", ["fakepkg"])
    assert final_files(tmp_path / "again") == final_files(sample)
    with pytest.raises(train_gpt.ConfigError, match="package no_such_package is not installed"):
        make_sample.make_sample(tmp_path / "more", ["fakepkg", "no_such_package"])

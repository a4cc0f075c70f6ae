"""Properties of data/tokenize_docs.py and data/make_sample.py.   pytest tests/test_data_tools.py"""

import errno
import gzip
import itertools
import json
import lzma
import os
import random
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import make_sample
import numpy as np
import pytest
import sentencepiece
import tokenize_docs
import zstandard

import train_gpt

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
BOS = 1
SPACE_PIECE = b"\n\x03\xe2\x96\x81"  # the piece U+2581 as it stands in a serialized model
COMPRESS = {
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def make_words(seed: int, count: int = 300) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
        for _ in range(count)
    ]


def make_text(rng: random.Random, words: list[str], length: int) -> str:
    return " ".join(rng.choices(words, k=length))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng, words = random.Random(1), make_words(2)
    texts = [f"{make_text(rng, words, rng.randint(5, 80))} 1234" for _ in range(120)]
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


def write_jsonl(path: Path, texts: list[str]) -> Path:
    data = "".join(
        json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)
    ).encode()
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    return path


def run(*argv: object) -> None:
    train_gpt.run_entry_point(lambda: tokenize_docs.main([str(arg) for arg in argv]))


def final_files(folder: Path) -> list[Path]:
    """Files that a user or a trainer would take for results."""
    names = (
        path for pattern in ("*.bin", "*.model", "manifest.json") for path in folder.rglob(pattern)
    )
    return [
        p for p in names if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]


def refused(capsys, output: Path, *argv: object) -> str:
    """Message of a run that must exit with 2, print one line and leave no result behind."""
    with pytest.raises(SystemExit) as exit_info:
        run("--output", output, "--name", "set", *argv)
    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert final_files(output) == []
    assert not list(output.rglob("*.partial"))
    return message


def tokens_of(folder: Path, split: str) -> np.ndarray:
    shards = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    return np.concatenate([np.asarray(train_gpt.load_data_shard(path)) for path in shards])


def split_at_bos(tokens: np.ndarray) -> list[list[int]]:
    assert tokens[0] == BOS
    return [part[1:].tolist() for part in np.split(tokens, np.flatnonzero(tokens == BOS)[1:])]


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def test_shards_decode_to_the_normalised_documents_in_order(
    documents, model, model_path, tmp_path, capsys
):
    train = write_jsonl(tmp_path / "train.jsonl", [*documents[10:], "", " \n "])
    val = write_jsonl(tmp_path / "val.jsonl", documents[:10])
    run(
        "--train",
        train,
        "--val",
        val,
        "--tokenizer",
        model_path,
        "--output",
        tmp_path / "out",
        "--name",
        "set",
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    folder = tmp_path / "out" / "datasets" / "set"
    for split, texts in (("val", documents[:10]), ("train", documents[10:])):
        decoded = [tokenizer.decode(ids) for ids in split_at_bos(tokens_of(folder, split))]
        assert decoded == [normalised(text) for text in texts]
    header = np.fromfile(folder / "fineweb_val_000000.bin", "<i4", 256)
    assert header[:3].tolist() == [20240520, 1, len(tokens_of(folder, "val"))]
    assert not header[3:].any()
    assert (tmp_path / "out" / "tokenizers" / "tiny.model").read_bytes() == model
    summary = capsys.readouterr().out
    assert "train: 110 documents (2 empty ones skipped)" in summary
    assert f"{sum(len(text.encode()) for text in documents[:10]):,} bytes of text" in summary


def test_manifest_has_the_challenge_keys_and_true_counts_and_keeps_other_datasets(
    documents, model_path, tmp_path
):
    train = write_jsonl(tmp_path / "train.jsonl", documents)
    shared = (
        "--train",
        train,
        "--num-val-docs",
        7,
        "--tokenizer",
        model_path,
        "--output",
        tmp_path / "out",
    )
    run(*shared, "--name", "one", "--shard-tokens", 500)
    run(*shared, "--name", "two")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {
        "version",
        "num_docs",
        "num_val_docs",
        "shuffle_seed",
        "shard_size",
        "append_eos",
    } <= manifest.keys()
    assert {"docs_jsonl", "docs_meta", "tokenizer_specs"} <= manifest.keys()
    assert [entry["name"] for entry in manifest["datasets"]] == ["one", "two"]
    assert [entry["name"] for entry in manifest["tokenizers"]] == ["tiny"]
    for entry in manifest["datasets"]:
        for split, docs in (("val", 7), ("train", 113)):
            shards = sorted((tmp_path / "out").glob(entry[f"{split}_glob"]))
            count = sum(len(train_gpt.load_data_shard(path)) for path in shards)
            stats = entry["stats"]
            assert (stats[f"docs_{split}"], stats[f"files_{split}"], stats[f"tokens_{split}"]) == (
                docs,
                len(shards),
                count,
            )
    assert manifest["datasets"][0]["stats"]["files_train"] > 1


def test_all_input_forms_give_identical_shards(documents, model_path, tmp_path):
    texts = documents[:30]
    val = write_jsonl(tmp_path / "val.jsonl", documents[30:35])
    inputs = {
        form: [write_jsonl(tmp_path / f"train.jsonl{form}", texts)] for form in ("", *COMPRESS)
    }
    inputs["two files"] = [
        write_jsonl(tmp_path / "a.jsonl.xz", texts[:11]),
        write_jsonl(tmp_path / "b.jsonl", texts[11:]),
    ]
    frames = [
        write_jsonl(tmp_path / "part.jsonl.gz", part).read_bytes()
        for part in (texts[:5], texts[5:])
    ]
    inputs["two frames"] = [tmp_path / "frames.jsonl.gz"]
    inputs["two frames"][0].write_bytes(b"".join(frames))
    inputs["folder"] = [tmp_path / "folder"]
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for i, text in enumerate(texts):
        (tmp_path / "folder" / f"{i:03d}{'.txt' if i % 2 else '.md'}").write_bytes(text.encode())
    (tmp_path / "folder" / "ignored.py").write_text("not a document")
    shards = {}
    for form, paths in inputs.items():
        output = tmp_path / f"out {form}"
        run(
            "--train",
            *paths,
            "--val",
            val,
            "--tokenizer",
            model_path,
            "--output",
            output,
            "--name",
            "set",
        )
        shards[form] = (output / "datasets" / "set" / "fineweb_train_000000.bin").read_bytes()
    assert len(shards[""]) > 1024 + 2 * len(texts)
    for form, data in shards.items():
        assert data == shards[""], form


def test_documents_straddle_shards_without_loss(documents, model_path, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", documents)
    shared = ("--train", train, "--num-val-docs", 20, "--tokenizer", model_path)
    run(*shared, "--output", tmp_path / "whole", "--name", "set")
    run(*shared, "--output", tmp_path / "tiny", "--name", "set", "--shard-tokens", 97)
    for split in ("train", "val"):
        shards = sorted((tmp_path / "tiny" / "datasets" / "set").glob(f"fineweb_{split}_*.bin"))
        assert [path.name for path in shards] == [
            f"fineweb_{split}_{i:06d}.bin" for i in range(len(shards))
        ]
        counts = [len(train_gpt.load_data_shard(path)) for path in shards]
        assert set(counts[:-1]) == {97}
        assert 0 < counts[-1] <= 97
        assert any(train_gpt.load_data_shard(path)[0] != BOS for path in shards)
        whole = tokens_of(tmp_path / "whole" / "datasets" / "set", split)
        assert np.array_equal(tokens_of(tmp_path / "tiny" / "datasets" / "set", split), whole)


def test_a_shard_that_is_exactly_full_is_not_followed_by_an_empty_one(model, tmp_path):
    writer = tokenize_docs.ShardWriter(tmp_path, "train", 10)
    writer.add(np.arange(20, dtype="<u2"))
    writer.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
    ]


def test_validation_is_the_first_documents_and_its_files_match_no_training_glob(
    documents, model_path, tmp_path
):
    train = write_jsonl(tmp_path / "train.jsonl", documents)
    run(
        "--train",
        train,
        "--num-val-docs",
        5,
        "--tokenizer",
        model_path,
        "--output",
        tmp_path,
        "--name",
        "set",
    )
    folder = tmp_path / "datasets" / "set"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    decoded = [tokenizer.decode(ids) for ids in split_at_bos(tokens_of(folder, "val"))]
    assert decoded == [normalised(text) for text in documents[:5]]
    train_files, val_files = (
        set(folder.glob(f"fineweb_{split}_*.bin")) for split in ("train", "val")
    )
    assert train_files
    assert val_files
    assert not train_files & val_files
    assert train_files | val_files == set(folder.iterdir())


@pytest.mark.parametrize("by_count", [False, True])
def test_a_trained_tokenizer_knows_the_training_split_only(documents, tmp_path, by_count):
    train_texts = [f"{text} \u00f6\u00f6\u00f6" for text in documents[20:]]
    val_texts = [f"{text} \u0416\u0416\u0416\u0416\u0416" for text in documents[:20]]
    if by_count:
        inputs = (
            "--train",
            write_jsonl(tmp_path / "all.jsonl", val_texts + train_texts),
            "--num-val-docs",
            20,
        )
    else:
        train, val = (
            write_jsonl(tmp_path / f"{i}.jsonl", texts)
            for i, texts in enumerate((train_texts, val_texts))
        )
        inputs = ("--train", train, "--val", val)
    run(*inputs, "--train-tokenizer", 400, "--output", tmp_path, "--name", "set")
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "tokenizers" / "set_bpe.model")
    )
    pieces = "".join(tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size()))
    assert "\u00f6" in pieces
    assert "\u0416" not in pieces
    leaky = tokenize_docs.train_tokenizer(train_texts + val_texts, 400)
    assert "\u0416".encode() in leaky


def test_a_trained_tokenizer_has_the_challenge_settings(documents, model):
    tokenizer = tokenize_docs.load_tokenizer(model, "tiny")
    assert tokenizer.vocab_size() == 400
    assert sum(map(tokenizer.is_byte, range(400))) == 256
    assert "".join(tokenizer.encode("1234 1234", out_type=str)) == "1234\u25811234"
    assert all(
        len(piece.lstrip("\u2581")) <= 1 for piece in tokenizer.encode("1234 1234", out_type=str)
    )
    assert not tokenizer.encode("tokens", out_type=str)[0].startswith("\u2581")
    assert "xxxx" in "".join(tokenizer.id_to_piece(i) for i in range(400)), (
        "a document over 4,192 bytes was dropped"
    )
    assert tokenize_docs.train_tokenizer(documents, 400) == model


def test_tokenizer_train_docs_limits_what_the_tokenizer_reads(documents, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", documents)
    limited = (
        "--train-tokenizer",
        340,
        "--tokenizer-train-docs",
        30,
        "--output",
        tmp_path,
        "--name",
        "set",
    )
    run("--train", train, "--num-val-docs", 5, *limited)
    expected = tokenize_docs.train_tokenizer(documents[5:35], 340)
    assert (tmp_path / "tokenizers" / "set_bpe.model").read_bytes() == expected


BAD_LINES = {
    "malformed": (b'{"text": "a"}\n{"text": "b"\n', ":2: malformed JSON"),
    "array": (b'{"text": "a"}\n\n["text"]\n', ':3: no "text" key'),
    "no key": (b'{"body": "a"}\n', ':1: no "text" key'),
    "not text": (b'{"text": 5}\n', ':1: "text" is a int'),
    "latin-1": (b'{"text": "caf\xe9"}\n', ":1: invalid UTF-8"),
    "surrogate": (b'{"text": "\\ud800"}\n', ":1: invalid UTF-8"),
    "nested": (b"[" * 100_000 + b"\n", ":1: malformed JSON"),
    "empty": (b"", "the train split has no document"),
    "only empty documents": (b'{"text": ""}\n{"text": " "}\n', "the train split has no document"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_documents_are_refused_in_one_line(case, documents, model_path, tmp_path, capsys):
    data, expected = BAD_LINES[case]
    (tmp_path / "bad.jsonl").write_bytes(data)
    val = write_jsonl(tmp_path / "val.jsonl", documents[:5])
    inputs = ("--train", tmp_path / "bad.jsonl", "--val", val)
    message = refused(capsys, tmp_path / "out", *inputs, "--tokenizer", model_path)
    assert expected in message
    if case not in ("empty", "only empty documents"):
        assert refused(capsys, tmp_path / "out", *inputs, "--train-tokenizer", 300) == message


@pytest.mark.parametrize("suffix", COMPRESS)
def test_truncated_and_damaged_compressed_files_are_refused(
    suffix, documents, model_path, tmp_path, capsys
):
    whole = write_jsonl(tmp_path / f"train.jsonl{suffix}", documents)
    data = whole.read_bytes()
    val = write_jsonl(tmp_path / "val.jsonl", documents[:5])
    argv = ("--train", whole, "--val", val, "--tokenizer", model_path)
    for cut in (len(data) // 2, len(data) - 1):
        whole.write_bytes(data[:cut])
        assert "truncated" in refused(capsys, tmp_path / "out", *argv)
    whole.write_bytes(b"not compressed at all")
    assert "damaged" in refused(capsys, tmp_path / "out", *argv)
    whole.write_bytes(data)
    run(*argv, "--output", tmp_path / "out", "--name", "set")


def test_missing_and_empty_inputs_are_refused(documents, model_path, tmp_path, capsys):
    train = write_jsonl(tmp_path / "train.jsonl", documents)
    (tmp_path / "folder").mkdir()
    output, tokenizer = tmp_path / "out", ("--tokenizer", model_path)
    missing = tmp_path / "missing.jsonl"
    assert "missing.jsonl" in refused(
        capsys, output, "--train", missing, "--num-val-docs", 1, *tokenizer
    )
    assert "missing.jsonl" in refused(
        capsys, output, "--train", train, "--val", missing, *tokenizer
    )
    gone = ("--tokenizer", tmp_path / "gone.model")
    assert "gone.model" in refused(capsys, output, "--train", train, "--num-val-docs", 1, *gone)
    assert "no .txt" in refused(
        capsys, output, "--train", tmp_path / "folder", "--num-val-docs", 1, *tokenizer
    )
    assert "train split" in refused(
        capsys, output, "--train", train, "--num-val-docs", 120, *tokenizer
    )
    assert "one split" in refused(capsys, output, "--train", train, "--val", train, *tokenizer)
    many = ("--train-tokenizer", 30_000)
    assert "Vocabulary size" in refused(
        capsys, output, "--train", train, "--num-val-docs", 1, *many
    )
    (tmp_path / "folder" / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt: invalid" in refused(
        capsys, output, "--train", train, "--val", tmp_path / "folder", *tokenizer
    )
    assert "plain folder" in refused(
        capsys,
        output,
        "--train",
        train,
        "--num-val-docs",
        1,
        *tokenizer,
        "--tokenizer-name",
        "../up",
    )


def model_with_other_ids(documents: list[str], folder: Path) -> bytes:
    prefix = folder / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=300,
        minloglevel=2,
        byte_fallback=True,
        pad_id=3,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        max_sentence_length=10_000,
    )
    return prefix.with_suffix(".model").read_bytes()


def model_with_more_pieces(model: bytes, count: int) -> bytes:
    """Protobuf messages concatenate: every added field 1 is one more piece (string, score)."""
    pieces = (
        b"\n\x07" + f"~{i:06d}".encode() + b"\x15" + struct.pack("<f", -1e6) for i in range(count)
    )
    return model + b"".join(b"\n" + bytes([len(piece)]) + piece for piece in pieces)


@pytest.mark.parametrize("case", ["ids", "large", "no space", "garbage", "empty"])
def test_unfit_tokenizers_are_refused(case, documents, model, tmp_path, capsys):
    assert model.count(SPACE_PIECE) == 1
    data, expected = {
        "ids": lambda: (model_with_other_ids(documents, tmp_path), "special ids"),
        "large": lambda: (model_with_more_pieces(model, 65_537 - 400), "65,537 pieces"),
        "no space": lambda: (model.replace(SPACE_PIECE, b"\n\x03\xe2\x98\x83"), "U+2581"),
        "garbage": lambda: (b"garbage", "not a SentencePiece model"),
        "empty": lambda: (b"", "not a SentencePiece model"),
    }[case]()
    path = tmp_path / "unfit.model"
    path.write_bytes(data)
    train = write_jsonl(tmp_path / "train.jsonl", documents)
    message = refused(
        capsys, tmp_path / "out", "--train", train, "--num-val-docs", 5, "--tokenizer", path
    )
    assert expected in message


def test_the_largest_tokenizer_that_fits_uint16_is_accepted(model):
    tokenizer = tokenize_docs.load_tokenizer(model_with_more_pieces(model, 65_536 - 400), "large")
    assert tokenizer.vocab_size() == 65_536


def test_full_disk_is_refused_in_one_line(documents, model_path, tmp_path, capsys, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    train = write_jsonl(tmp_path / "train.jsonl", documents)
    monkeypatch.setattr(os, "fsync", no_space)
    message = refused(
        capsys, tmp_path / "out", "--train", train, "--num-val-docs", 5, "--tokenizer", model_path
    )
    assert "No space left" in message


def test_an_output_that_is_a_file_is_refused(documents, model_path, tmp_path, capsys):
    train = write_jsonl(tmp_path / "train.jsonl", documents)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "datasets").write_text("in the way")
    refused(
        capsys, tmp_path / "out", "--train", train, "--num-val-docs", 5, "--tokenizer", model_path
    )


@pytest.mark.parametrize("writes_before", [0, 3])
def test_an_interrupted_run_leaves_nothing_new_and_keeps_the_old(
    writes_before, documents, model_path, tmp_path, monkeypatch
):
    train = write_jsonl(tmp_path / "train.jsonl", documents)
    argv = (
        "--train",
        train,
        "--num-val-docs",
        5,
        "--tokenizer",
        model_path,
        "--shard-tokens",
        300,
        "--overwrite",
    )
    run(*argv, "--output", tmp_path / "old", "--name", "set")
    before = {path: path.read_bytes() for path in final_files(tmp_path / "old")}
    fsync = os.fsync

    def interrupted(descriptor):
        calls.append(descriptor)
        if len(calls) > writes_before:
            raise KeyboardInterrupt
        fsync(descriptor)

    for output in ("old", "new"):
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupted)
            with pytest.raises(SystemExit) as ended:
                run(*argv, "--output", tmp_path / output, "--name", "set")
            assert ended.value.code == 130
    assert final_files(tmp_path / "new") == []
    assert {path: path.read_bytes() for path in final_files(tmp_path / "old")} == before


def test_existing_shards_are_refused_and_overwrite_leaves_none_of_them(
    documents, model_path, tmp_path, capsys
):
    train = write_jsonl(tmp_path / "train.jsonl", documents)
    argv = (
        "--train",
        train,
        "--num-val-docs",
        5,
        "--tokenizer",
        model_path,
        "--output",
        tmp_path,
        "--name",
        "set",
    )
    run(*argv, "--shard-tokens", 300)
    folder = tmp_path / "datasets" / "set"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as exit_info:
        run(*argv)
    assert exit_info.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    run(*argv, "--overwrite")
    assert sorted(path.name for path in folder.iterdir()) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
    ]


def test_another_tokenizer_of_the_same_name_is_not_replaced_unasked(
    documents, model_path, tmp_path, capsys
):
    train = write_jsonl(tmp_path / "train.jsonl", documents)
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "tiny.model").write_bytes(b"precious")
    argv = (
        "--train",
        train,
        "--num-val-docs",
        5,
        "--tokenizer",
        model_path,
        "--output",
        tmp_path,
        "--name",
        "set",
    )
    with pytest.raises(SystemExit):
        run(*argv)
    assert "another tokenizer" in capsys.readouterr().err
    assert (tmp_path / "tokenizers" / "tiny.model").read_bytes() == b"precious"


def test_a_foreign_manifest_is_refused_before_any_work(documents, model_path, tmp_path, capsys):
    train = write_jsonl(tmp_path / "train.jsonl", documents)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(SystemExit):
        run(
            "--train",
            train,
            "--num-val-docs",
            5,
            "--tokenizer",
            model_path,
            "--output",
            tmp_path,
            "--name",
            "set",
        )
    assert "manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "datasets").exists()


def test_the_script_refuses_without_a_traceback_and_help_has_an_example(tmp_path):
    script = [sys.executable, ROOT / "data" / "tokenize_docs.py"]
    argv = [
        "--train",
        tmp_path / "missing.jsonl",
        "--num-val-docs",
        "1",
        "--train-tokenizer",
        "300",
        "--name",
        "set",
    ]
    result = subprocess.run(
        [*script, *argv, "--output", tmp_path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'missing.jsonl'}: no such file or folder\n"
    result = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True)
    assert "python data/tokenize_docs.py --train a.jsonl.xz" in result.stdout


@pytest.mark.parametrize(
    "path", sorted((SHARED / "tokenizers").glob("*.model")) or [None], ids=lambda p: p and p.stem
)
def test_real_tokenizers_encode_real_documents(path, tmp_path):
    if path is None or not (SHARED / "fineweb_val.jsonl.xz").exists():
        pytest.skip("no ../shared/data")
    texts = list(
        itertools.islice(tokenize_docs.read_documents([SHARED / "fineweb_val.jsonl.xz"]), 8)
    )
    destination = tokenize_docs.Destination(tmp_path, "real", path.stem)
    tokenize_docs.write_dataset(destination, path.read_bytes(), texts[:2], texts[2:], 2)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for split, expected in (("val", texts[:2]), ("train", texts[2:])):
        tokens = tokens_of(destination.folder, split)
        assert tokens.max() < tokenizer.vocab_size()
        assert [tokenizer.decode(ids) for ids in split_at_bos(tokens)] == [
            normalised(text) for text in expected
        ]


def write_package(root: Path) -> dict[str, str]:
    """A package of 100 modules with planted duplicates; returns the names of the modules of interest."""
    rng, words = random.Random(5), make_words(6, 500)
    names = [f"fakepkg.part{i:03d}" for i in range(100)]
    texts = {name: [make_text(rng, words, 60) for _ in range(4)] for name in names}
    val_names = [name for name in names if make_sample.is_validation(name)]
    train_names = [name for name in names if name not in val_names]
    clean, copied, partly = val_names[:3]
    texts[copied] = [
        " ".join([*text.split()[:-2], "other", "end"]) for text in texts[train_names[4]]
    ]
    texts[partly][0] = " ".join(
        [*texts[train_names[5]][0].split()[:20], *texts[partly][0].split()[20:]]
    )
    texts[train_names[7]] = [*texts[train_names[8]], "only here: " + make_text(rng, words, 30)]
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    (root / "template.py").write_text("this is {{ not }} Python")
    for name in names:
        module, *functions = texts[name]
        body = [
            f'"""{module}"""',
            *(f'def f{i}():\n    """{text}\n    """' for i, text in enumerate(functions)),
        ]
        (root / f"{name.split('.')[1]}.py").write_text("\n".join(body) + "\n")
    return {
        "clean": clean,
        "copied": copied,
        "partly": partly,
        "twin": train_names[7],
        "twin_of": train_names[8],
    }


@pytest.fixture
def package(tmp_path) -> make_sample.Package:
    return make_sample.Package("fakepkg", tmp_path / "site" / "fakepkg", "1.0")


def test_no_validation_document_repeats_training_text(package):
    planted = write_package(package.root)
    training, validation = make_sample.split_documents(make_sample.read_modules([package], 1))
    assert planted["clean"] in validation
    assert planted["copied"] not in validation
    assert planted["partly"] not in validation
    assert not set(training) & set(validation)
    assert all(make_sample.is_validation(name) for name in validation)
    in_training = set().union(*map(make_sample.shingles, training.values()))
    for text in validation.values():
        assert (
            make_sample.share_within(make_sample.shingles(text), in_training)
            <= make_sample.MAX_SHARED_SHARE
        )
    twins = [training[planted["twin"]], training[planted["twin_of"]]]
    assert make_sample.share_within(*map(make_sample.shingles, twins)) == 0
    assert "only here" in twins[0]


def sample_files(output: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file()
    }


def test_sample_is_the_same_in_every_process_and_cached(package, tmp_path, capsys):
    write_package(package.root)
    first = tmp_path / "first"
    make_sample.make_sample(first, [package], 1)
    files = sample_files(first)
    assert sorted(files) == [
        "datasets/sample_sp1024/fineweb_train_000000.bin",
        "datasets/sample_sp1024/fineweb_val_000000.bin",
        "datasets/sample_sp1024/sample.json",
        "tokenizers/sample_1024_bpe.model",
    ]
    assert " documents (" in capsys.readouterr().out
    code = (
        f"import sys, pathlib; sys.path.insert(0, {str(ROOT / 'data')!r}); import make_sample as m; "
        f"m.make_sample(pathlib.Path({str(tmp_path / 'second')!r}), "
        f"[m.Package('fakepkg', pathlib.Path({str(package.root)!r}), '1.0')], 1)"
    )
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "7"}, check=True
    )
    assert sample_files(tmp_path / "second") == files

    (package.root / "part000.py").write_text('"""Changed, but the version is the same."""')
    make_sample.make_sample(first, [package], 1)
    assert "nothing to do" in capsys.readouterr().out
    assert sample_files(first) == files


def test_sample_is_made_again_when_versions_or_files_differ(package, tmp_path, capsys):
    write_package(package.root)
    output = tmp_path / "out"
    make_sample.make_sample(output, [package], 1)
    files = sample_files(output)
    (output / "datasets" / "sample_sp1024" / "fineweb_val_000000.bin").write_bytes(b"cut")
    make_sample.make_sample(output, [package], 1)
    assert sample_files(output) == files
    newer = make_sample.Package(package.name, package.root, "1.1")
    make_sample.make_sample(output, [newer], 1)
    assert "nothing to do" not in capsys.readouterr().out
    stamp = json.loads((output / "datasets" / "sample_sp1024" / "sample.json").read_text())
    assert stamp["made_by"]["fakepkg"] == "1.1"


def test_packages_are_found_without_importing_them_and_a_missing_one_is_named(package, monkeypatch):
    write_package(package.root)
    info = package.root.with_name("fakepkg-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fakepkg\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(package.root.parent))
    assert make_sample.installed_packages(("fakepkg",)) == [package]
    with pytest.raises(train_gpt.Refusal, match="package no_such_package is not installed"):
        make_sample.installed_packages(("fakepkg", "no_such_package"))


def test_workers_read_the_same_docstrings_as_one_process(package):
    write_package(package.root)
    alone = make_sample.read_modules([package], 1)
    assert len(alone) == 100
    assert make_sample.read_modules([package], 2) == alone

"""data/tokenize_docs.py and data/make_sample.py.   pytest tests/test_data_tools.py"""

import bz2
import gzip
import json
import lzma
import os
import random
import struct
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
from train_gpt import BOS_ID, load_data_shard

ROOT = Path(__file__).resolve().parents[1]
SPACE_PIECE = b"\n\x03\xe2\x96\x81"  # the piece U+2581 as it stands in a serialized model
COMPRESS = {
    ".bz2": bz2.compress,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def make_words(seed: int, count: int = 300) -> list[str]:
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng, words = random.Random(1), make_words(2)
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 80))) + " 1234" for _ in range(120)]
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


def run(*argv: object) -> Path:
    """Tokenize into the data set "set", with 5 validation documents if nothing else is asked."""
    argv = [str(arg) for arg in argv]
    val = [] if {"--val", "--num-val-docs"} & {*argv} else ["--num-val-docs", "5"]
    argv = ["--name", "set", *val, *argv]
    train_gpt.run_entry_point(lambda: tokenize_docs.main(argv))
    return Path(argv[argv.index("--output") + 1]) / "datasets" / "set"


def final_files(folder: Path) -> dict[str, bytes]:
    """Files that a user or a trainer would take for results."""
    files = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.suffix in (".bin", ".model") or path.name == "manifest.json":
            files[name] = path.read_bytes()
    return files


def refused(capsys, output: Path, *argv: object) -> str:
    """Message of a run that must exit with 2, print one line and leave no file behind."""
    before = final_files(output)
    with pytest.raises(SystemExit) as exit_info:
        run("--output", output, *argv)
    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert final_files(output) == before
    assert not list(output.rglob("*.partial"))
    return message


def tokens_of(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([load_data_shard(p) for p in sorted(folder.glob(f"fineweb_{split}_*"))])


def decoded(folder: Path, split: str, model_path: Path) -> list[str]:
    """Text of every document of a split, which begins with BOS."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    tokens = tokens_of(folder, split)
    assert tokens[0] == BOS_ID
    parts = np.split(tokens, np.flatnonzero(tokens == BOS_ID)[1:])
    return [tokenizer.decode(part[1:].tolist()) for part in parts]


def normalised(texts: list[str]) -> list[str]:
    return [" ".join(unicodedata.normalize("NFKC", text).split()) for text in texts]


def test_shards_decode_to_the_normalised_documents_in_order(
    documents, model, model_path, tmp_path, capsys
):
    train = write_jsonl(tmp_path / "train.jsonl", [*documents[10:], "", " \n "])
    val = write_jsonl(tmp_path / "val.jsonl", documents[:10])
    folder = run("--train", train, "--val", val, "--tokenizer", model_path, "--output", tmp_path)
    assert decoded(folder, "val", model_path) == normalised(documents[:10])
    assert decoded(folder, "train", model_path) == normalised(documents[10:])
    header = np.fromfile(folder / "fineweb_val_000000.bin", "<i4", 256)
    assert header[:3].tolist() == [20240520, 1, len(tokens_of(folder, "val"))]
    assert not header[3:].any()
    assert (tmp_path / "tokenizers" / "tiny.model").read_bytes() == model
    summary = capsys.readouterr().out
    assert "train: 110 documents (2 empty ones skipped, 0 left out" in summary
    assert f"{sum(len(text.encode()) for text in documents[:10]):,} bytes of text" in summary


def test_manifest_has_true_counts_and_keeps_other_datasets(train, model_path, tmp_path):
    shared = ("--train", train, "--num-val-docs", 7, "--tokenizer", model_path)
    run(*shared, "--output", tmp_path, "--name", "one", "--shard-tokens", 500)
    run(*shared, "--output", tmp_path, "--name", "two")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["datasets"]] == ["one", "two"]
    assert [entry["name"] for entry in manifest["tokenizers"]] == ["tiny"]
    for entry in manifest["datasets"]:
        stats = entry["stats"]
        for split, docs in (("val", 7), ("train", 113)):
            shards = sorted(tmp_path.glob(f"datasets/{entry['name']}/fineweb_{split}_*.bin"))
            assert stats[f"docs_{split}"] == docs
            assert stats[f"files_{split}"] == len(shards)
            assert stats[f"tokens_{split}"] == sum(len(load_data_shard(path)) for path in shards)
    assert manifest["datasets"][0]["stats"]["files_train"] > 1


def test_all_input_forms_give_identical_shards(documents, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_docs, "CHUNK_BYTES", 1000)  # less than one of the lines
    texts = [*documents[:29], random.Random(7).randbytes(4_000).hex()]
    inputs = {}
    for suffix in ("", *COMPRESS):
        inputs[suffix] = [write_jsonl(tmp_path / f"train.jsonl{suffix}", texts)]
        names = [tmp_path / f"{i}.jsonl{suffix}" for i in (0, 15)]
        halves = [write_jsonl(names[i // 15], texts[i : i + 15]) for i in (0, 15)]
        frames = tmp_path / f"frames.jsonl{suffix}"
        padding = b"\0" * 8 if suffix else b""  # which their formats allow
        frames.write_bytes(padding.join(half.read_bytes() for half in halves))
        inputs[f"two frames {suffix}"] = [frames]
    first, second = tmp_path / "a.jsonl.xz", tmp_path / "b.jsonl"
    inputs["two files"] = [write_jsonl(first, texts[:11]), write_jsonl(second, texts[11:])]
    second.write_bytes(b"\xef\xbb\xbf" + second.read_bytes().replace(b"\n", b"\r\n\r\n").rstrip())
    inputs["upper case"] = [write_jsonl(tmp_path / "TRAIN.JSONL.GZ", texts)]
    inputs["folder"] = [tmp_path / "folder"]
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for i, text in enumerate(texts):
        (tmp_path / "folder" / f"{i:03d}{'.txt' if i % 2 else '.md'}").write_bytes(text.encode())
    (tmp_path / "folder" / "ignored.py").write_text("not a document")
    val = write_jsonl(tmp_path / "val.jsonl", documents[30:35])
    shared = ("--val", val, "--tokenizer", model_path)
    shards = {}
    for form, paths in inputs.items():
        folder = run("--train", *paths, *shared, "--output", tmp_path / f"out {form}")
        shards[form] = (folder / "fineweb_train_000000.bin").read_bytes()
    assert len(shards[""]) > 1024 + 2 * len(texts)
    assert [form for form, data in shards.items() if data != shards[""]] == []


def test_documents_straddle_shards_without_loss(train, model_path, tmp_path):
    shared = ("--train", train, "--num-val-docs", 20, "--tokenizer", model_path)
    whole = run(*shared, "--output", tmp_path / "whole")
    tiny = run(*shared, "--output", tmp_path / "tiny", "--shard-tokens", 97)
    for split in ("train", "val"):
        shards = sorted(tiny.glob(f"fineweb_{split}_*.bin"))
        numbered = [f"fineweb_{split}_{i:06d}.bin" for i in range(len(shards))]
        assert [path.name for path in shards] == numbered
        counts = [len(load_data_shard(path)) for path in shards]
        assert set(counts[:-1]) == {97}
        assert 0 < counts[-1] <= 97
        assert any(load_data_shard(path)[0] != BOS_ID for path in shards)
        assert np.array_equal(tokens_of(tiny, split), tokens_of(whole, split))
    full = tokenize_docs.shards_of([np.arange(20, dtype="<u2")], 10)
    assert [len(shard) for shard in full] == [10, 10], "no empty shard follows a full one"


@pytest.mark.parametrize("by_count", [False, True])
def test_a_trained_tokenizer_knows_the_training_split_only(documents, tmp_path, by_count):
    train_texts = [f"{text} \u00f6\u00f6\u00f6" for text in documents[20:]]
    val_texts = [f"{text} \u0416\u0416\u0416\u0416\u0416" for text in documents[:20]]
    val = write_jsonl(tmp_path / "val.jsonl", val_texts)
    inputs = ["--train", write_jsonl(tmp_path / "a.jsonl", train_texts), "--val", val]
    if by_count:
        both = write_jsonl(tmp_path / "all.jsonl", val_texts + train_texts)
        inputs = ["--train", both, "--num-val-docs", 20]
    folder = run(*inputs, "--train-tokenizer", 400, "--output", tmp_path)
    path = tmp_path / "tokenizers" / "set_bpe.model"
    assert len(decoded(folder, "val", path)) == 20
    assert "\u0416".encode() not in path.read_bytes()
    assert "\u0416".encode() in tokenize_docs.train_tokenizer(train_texts + val_texts, 400)
    assert path.read_bytes() == tokenize_docs.train_tokenizer(train_texts, 400)


def test_a_trained_tokenizer_has_the_challenge_settings(model):
    tokenizer = tokenize_docs.load_tokenizer(model, "tiny")
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    assert len(pieces) == 400
    assert sum(map(tokenizer.is_byte, range(400))) == 256
    digits = tokenizer.encode("1234 1234", out_type=str)
    assert "".join(digits) == "1234\u25811234"
    assert all(len(piece.lstrip("\u2581")) <= 1 for piece in digits)
    assert not tokenizer.encode("tokens", out_type=str)[0].startswith("\u2581")
    assert "xxxx" in "".join(pieces), "a document over 4,192 bytes was dropped"


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
def test_bad_documents_are_refused_by_file_and_line(case, train, model_path, tmp_path, capsys):
    data, expected = BAD_LINES[case]
    (tmp_path / "bad.jsonl").write_bytes(data)
    inputs = ("--train", tmp_path / "bad.jsonl", "--val", train)
    message = refused(capsys, tmp_path / "out", *inputs, "--tokenizer", model_path)
    assert expected in message
    if "split" not in expected:
        assert refused(capsys, tmp_path / "out", *inputs, "--train-tokenizer", 300) == message


@pytest.mark.parametrize("suffix", COMPRESS)
def test_truncated_and_damaged_compressed_files_are_refused(
    suffix, documents, model_path, tmp_path, capsys
):
    whole = write_jsonl(tmp_path / f"train.jsonl{suffix}", documents)
    data = whole.read_bytes()
    argv = ("--train", whole, "--tokenizer", model_path)
    for cut in (data[: len(data) // 2], data[:-1], data + data[:-1]):
        whole.write_bytes(cut)
        assert "truncated" in refused(capsys, tmp_path / "out", *argv)
    for damaged in (b"not compressed at all", data + b"junk", data + b"x" + data[1:]):
        whole.write_bytes(damaged)
        assert "damaged" in refused(capsys, tmp_path / "out", *argv)


def test_missing_empty_and_wrong_inputs_are_refused(train, model_path, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    missing, model = tmp_path / "missing.jsonl", ("--tokenizer", model_path)
    cases = {
        "missing.jsonl": ("--train", missing, *model),
        "gone.model": ("--train", train, "--tokenizer", tmp_path / "gone.model"),
        "nor a folder of those": ("--train", folder, *model),
        "train split": ("--train", train, "--num-val-docs", 120, *model),
        "no document of its own": ("--train", train, "--val", train, *model),
        "Vocabulary size": ("--train", train, "--train-tokenizer", 30_000),
        "plain folder": ("--train", train, *model, "--name", "../up"),
    }
    for expected, argv in cases.items():
        assert expected in refused(capsys, tmp_path / "out", *argv)
    for name in ("a.csv", "a.JSON.gz", "a.jsonl.zip", "a.txt.gz", "a"):
        (tmp_path / name).write_bytes(train.read_bytes())
        kinds = ".jsonl (plain, .bz2, .gz, .xz, .zst), .parquet, .txt, .md"
        message = refused(capsys, tmp_path / "out", "--train", tmp_path / name, *model)
        assert f"{name}: not a file of {kinds}, nor a folder of those" in message
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    message = refused(capsys, tmp_path / "out", "--train", train, "--val", folder, *model)
    assert "latin.txt: invalid" in message


def test_parquet_needs_pyarrow(train, model_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    argv = ("--train", path, "--val", train, "--tokenizer", model_path)
    assert "a.parquet: pyarrow reads .parquet: pip install" in refused(capsys, tmp_path, *argv)


def test_parquet_is_read_as_jsonl_is(documents, train, model_path, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(**columns) -> Path:
        parquet.write_table(pyarrow.table(columns), tmp_path / "A.Parquet", row_group_size=50)
        return tmp_path / "A.Parquet"

    shared = ("--tokenizer", model_path)
    plain = run("--train", train, *shared, "--output", tmp_path / "plain")
    path = write(id=list(range(len(documents))), text=documents)
    folder = run("--train", path, *shared, "--output", tmp_path / "parquet")
    for split in ("train", "val"):
        assert np.array_equal(tokens_of(folder, split), tokens_of(plain, split))
    bad = {
        "column of texts": {"body": documents},
        'A.Parquet, row 2: "text" is a NoneType': {"text": ["a", None]},
    }
    for said, columns in bad.items():
        assert said in refused(capsys, tmp_path / "out", "--train", write(**columns), *shared)
    path.write_bytes(path.read_bytes()[:-9])
    assert "no Parquet file" in refused(capsys, tmp_path / "out", "--train", path, *shared)


def model_with_more_pieces(model: bytes, count: int) -> bytes:
    """Protobuf messages concatenate: every added field 1 is one more piece (string, score)."""
    score = b"\x15" + struct.pack("<f", -1e6)
    pieces = [b"\n\x07" + f"~{i:06d}".encode() + score for i in range(count)]
    return model + b"".join(b"\n" + bytes([len(piece)]) + piece for piece in pieces)


def model_with_other_ids(documents: list[str]) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_docs, "SPECIAL_IDS", (3, 1, 2, 0))
        return tokenize_docs.train_tokenizer(documents, 300)


def test_unfit_tokenizers_are_refused(train, documents, model, tmp_path, capsys):
    unfit = {
        "special ids": model_with_other_ids(documents),
        "65,537 pieces": model_with_more_pieces(model, 65_537 - 400),
        "U+2581": model.replace(SPACE_PIECE, b"\n\x03\xe2\x98\x83"),
        "garbage.model: not a SentencePiece model": b"garbage",
        "empty.model: not a SentencePiece model": b"",
    }
    for expected, data in unfit.items():
        path = tmp_path / f"{expected.partition('.')[0]}.model"
        path.write_bytes(data)
        argv = ("--train", train, "--tokenizer", path)
        assert expected in refused(capsys, tmp_path / "out", *argv)
    largest = model_with_more_pieces(model, 65_536 - 400)
    assert tokenize_docs.load_tokenizer(largest, "largest").vocab_size() == 65_536


@pytest.mark.parametrize("writes_before", [0, 3])
def test_an_interrupted_run_leaves_nothing(writes_before, train, model_path, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def interrupted(descriptor):
        calls.append(descriptor)
        if len(calls) > writes_before:
            raise KeyboardInterrupt
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    argv = ("--train", train, "--tokenizer", model_path, "--shard-tokens", 300)
    with pytest.raises(SystemExit) as ended:
        run(*argv, "--output", tmp_path / "new")
    assert ended.value.code == 130
    assert final_files(tmp_path / "new") == {}


def test_what_is_there_is_never_replaced(train, model_path, tmp_path, capsys):
    argv = ("--train", train, "--tokenizer", model_path)
    run(*argv, "--output", tmp_path)
    assert "set is there already; delete it" in refused(capsys, tmp_path, *argv)
    (tmp_path / "manifest.json").write_text("[]")
    other = (*argv, "--name", "other")
    assert "manifest.json: not a manifest" in refused(capsys, tmp_path, *other)
    (tmp_path / "tokenizers" / "tiny.model").write_bytes(b"precious")
    assert "another tokenizer" in refused(capsys, tmp_path, *other)
    assert not (tmp_path / "datasets" / "other").exists()


def test_a_reader_that_has_left_is_no_error(train, model_path, tmp_path, capsys, monkeypatch):
    """As `| head` does; the end of the process flushes once more."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        folder = run("--train", train, "--tokenizer", model_path, "--output", tmp_path)
        nobody.flush()
    assert capsys.readouterr().err == ""
    assert (folder / "fineweb_val_000000.bin").exists()
    assert (tmp_path / "manifest.json").exists()


# ---- Both splits


def check(folder: Path) -> None:
    train_gpt.run_entry_point(lambda: tokenize_docs.main(["--verify", str(folder)]))


@pytest.mark.parametrize("by_count", [False, True])
def test_training_documents_that_validation_has_are_left_out_and_counted(
    documents, model_path, tmp_path, capsys, by_count
):
    """However their white space is, which no token tells."""
    val, own = documents[:5], documents[5:30]
    again = [val[2], val[4].replace(" ", " \n "), val[2]]
    inputs = ["--train", write_jsonl(tmp_path / "b.jsonl", own[:20] + again + own[20:])]
    inputs += ["--val", write_jsonl(tmp_path / "a.jsonl", val)]
    if by_count:
        inputs = ["--train", *inputs[3:], *inputs[1:2]]
    folder = run(*inputs, "--tokenizer", model_path, "--output", tmp_path, "--shard-tokens", 300)
    assert decoded(folder, "val", model_path) == normalised(val)
    assert decoded(folder, "train", model_path) == normalised(own)
    assert "train: 25 documents (0 empty ones skipped, 3 left out" in capsys.readouterr().out
    check(folder)
    said = "25 training and 5 different validation documents, none in both splits"
    assert said in capsys.readouterr().out


def test_a_document_of_both_splits_is_found_in_finished_shards(
    documents, model_path, tmp_path, capsys
):
    """Wherever it begins and ends: these shards are shorter than a document."""
    train = write_jsonl(tmp_path / "train.jsonl", documents[:30])
    argv = ("--train", train, "--tokenizer", model_path, "--shard-tokens", 97)
    folder = run(*argv, "--output", tmp_path)
    check(folder)
    assert "25 training and 5 different" in capsys.readouterr().out
    parts = sorted(folder.glob("fineweb_val_*.bin"))
    count = len(list(folder.glob("fineweb_train_*.bin")))
    for number, path in enumerate(parts, count):
        (folder / f"fineweb_train_{number:06d}.bin").write_bytes(path.read_bytes())
    with pytest.raises(SystemExit) as exit_info:
        check(folder)
    assert exit_info.value.code == 2
    said = "30 training and 5 different validation documents, 5 of training are in validation, too"
    error = capsys.readouterr().err
    assert f"error: {folder}: {said}; number 26 is the first\n" == error


# ---- The sample


@pytest.fixture
def planted() -> dict[str, str]:
    """Filled by `package`: the names of the modules of interest."""
    return {}


@pytest.fixture
def package(tmp_path, planted) -> dict[str, Path]:
    """A package of 100 modules with planted duplicates."""
    rng, words = random.Random(5), make_words(6, 500)
    names = [f"fakepkg.part{i:03d}" for i in range(100)]
    texts = {name: [" ".join(rng.choices(words, k=60)) for _ in range(4)] for name in names}
    val_names = [name for name in names if make_sample.is_validation(name)]
    train_names = [name for name in names if name not in val_names]
    planted |= dict(zip(("clean", "copied", "partly"), val_names, strict=False))
    planted |= {"twin": train_names[7], "twin_of": train_names[8]}
    originals = [text.split() for text in texts[train_names[4]]]
    texts[planted["copied"]] = [" ".join([*text[:-2], "other", "end"]) for text in originals]
    partly = texts[planted["partly"]]
    partly[0] = " ".join(texts[train_names[5]][0].split()[:20] + partly[0].split()[20:])
    own = "only here: " + " ".join(rng.choices(words, k=30))
    texts[planted["twin"]] = [*texts[planted["twin_of"]], own]

    root = tmp_path / "site" / "fakepkg"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    (root / "template.py").write_text("this is {{ not }} Python")
    for name, (module, *functions) in texts.items():
        body = [f'"""{module}"""']
        body += [f'def f{i}():\n    """{text}\n    """' for i, text in enumerate(functions)]
        (root / f"{name.split('.')[1]}.py").write_text("\n".join(body) + "\n")
    return {"fakepkg": root}


def test_no_validation_document_repeats_training_text(package, planted):
    training, validation = make_sample.split_documents(make_sample.read_modules(package))
    assert planted["clean"] in validation
    assert not {planted["copied"], planted["partly"]} & validation.keys()
    assert not training.keys() & validation.keys()
    in_training = set().union(*map(make_sample.shingles, training.values()))
    for text in validation.values():
        assert make_sample.share_within(make_sample.shingles(text), in_training) <= 0.02
    twins = [make_sample.shingles(training[planted[name]]) for name in ("twin", "twin_of")]
    assert make_sample.share_within(*twins) == 0
    assert "only here" in training[planted["twin"]]


def sample_files(output: Path) -> dict[str, bytes]:
    paths = [path for path in output.rglob("*") if path.is_file()]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}


def test_the_sample_is_made_once_and_the_same_in_another_place(package, tmp_path, capsys):
    make_sample.make_sample(tmp_path / "out", package)
    files = sample_files(tmp_path / "out")
    assert sorted(files) == [
        "datasets/sample_sp1024/fineweb_train_000000.bin",
        "datasets/sample_sp1024/fineweb_val_000000.bin",
        "manifest.json",
        "tokenizers/sample_1024_bpe.model",
    ]
    hp = train_gpt.Hyperparameters().override(
        data_path=str(tmp_path / "out" / "datasets" / "sample_sp1024"), vocab_size=1024
    )
    assert train_gpt.load_tokenizer(hp)[0].vocab_size() == 1024  # it is found beside the shards
    assert " documents (" in capsys.readouterr().out
    make_sample.make_sample(tmp_path / "out", package)
    assert "nothing to do" in capsys.readouterr().out
    assert make_sample.stable_hash("torch.nn") == 1984597600  # in every process
    make_sample.make_sample(tmp_path / "again", package)
    assert sample_files(tmp_path / "again") == files


def test_packages_are_found_without_importing_them_and_a_missing_one_is_named(package, monkeypatch):
    monkeypatch.syspath_prepend(str(package["fakepkg"].parent))
    assert make_sample.installed_packages(["fakepkg"]) == package
    with pytest.raises(train_gpt.ConfigError, match="package no_such_package is not installed"):
        make_sample.installed_packages(["fakepkg", "no_such_package"])

"""data/lossless_case.py and the shards made with it.   pytest tests/test_lossless_case.py"""

import itertools
import json
import lzma
import shutil
import unicodedata
from pathlib import Path

import lossless_case
import numpy as np
import pytest
import sentencepiece
import tokenize_docs
import torch
from conftest import tiny_hp
from helpers_cli import ROOT, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lossless_case import ALLCAPS, CAPNEXT, ESC, LOWER, OPERATORS, TITLE, decode, encode

import eval_sliding
import train_gpt
from train_gpt import BOS_ID, load_data_shard

T, A, C, E = TITLE, ALLCAPS, CAPNEXT, ESC
REAL = sorted((ROOT.parent / "shared" / "data").glob("*_val.jsonl.xz"))
ENCODED = {
    "the quick": "the quick",
    "The Fox": f"{T}the {T}fox",
    "NASA, I'M": f"{A}nasa, {T}i'{T}m",
    "iPhone McDONALD USa": f"i{C}phone {T}mc{C}d{C}o{C}n{C}a{C}l{C}d {T}u{C}sa",
    "A1B x_Y AB2CD": f"{T}a1{T}b x_{T}y {A}ab2{A}cd",
    "\u00c9COLE \u00c9t\u00e9": f"{A}\u00e9cole {T}\u00e9t\u00e9",
    # One sigma is enough for capitals; the final one is kept.
    "\u039f\u03a3 \u03bf\u03c2": f"{A}\u03bf\u03c3 \u03bf\u03c2",
    "STRASSE Stra\u00dfe STRA\u1e9eE": f"{A}strasse {T}stra\u00dfe {A}stra\u1e9e{T}e",
    "\u0130I \u0131i": f"\u0130{T}i \u0131i",
    "\u01c4\u01c5\u01c6 \u01c5 \u01c4": f"{T}\u01c6\u01c5\u01c6 \u01c5 {T}\u01c6",
    "\u212a \u2126 \u212b \u00b5": "\u212a \u2126 \u212b \u00b5",
    "\u1f88 \u1c90 \u10a0 \u13a0\uab70 \U00010400": (
        "\u1f88 \u1c90 \u10a0 \u13a0\uab70 \U00010400"
    ),
    "A\u0301B h\u0331 H\u0331": f"{T}a\u0301{T}b h\u0331 {T}h\u0331",
    f"{T} {E}{E}A{C}": f"{E}{T} {E}{E}{E}{E}{T}a{E}{C}",
    "\ue000\ue005\uf8ff": "\ue000\ue005\uf8ff",
    "": "",
}
HARD = "aZ \n\0\u00e9\u00c9\u00df\u1e9e\u0130\u0131\u03a3\u03c2\u01c4\u01c5"
HARD += "\u212a\u0301\u0331\uff21\ufb01\u2581"  # which NFKC changes, or joins to a letter
TEXTS = st.text(st.sampled_from([*OPERATORS, *HARD]) | st.characters(codec="utf-8"))


def exhaustive(examples: int):
    return settings(max_examples=examples, deadline=None, derandomize=True)


# ---- The transform


@pytest.mark.parametrize("text", ENCODED, ids=ascii)
def test_the_rules_are_those_of_the_readme(text):
    assert encode(text) == ENCODED[text]
    assert decode(ENCODED[text]) == text


@exhaustive(500)
@given(TEXTS)
def test_every_text_comes_back_and_has_no_capital_of_a_pair_before(text):
    encoded = encode(text)
    assert decode(encoded) == text
    assert not LOWER.keys() & set(encoded)


@pytest.mark.slow
def test_every_character_comes_back_beside_letters_of_either_case():
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    text = "".join(f"X{character}x{character}X" for character in characters)
    assert decode(encode(text)) == text


def test_pairs_are_those_of_unicode_3_2_and_of_as_many_bytes():
    """So that every Python decodes the shards of every other, and the audit need not know them."""
    known = unicodedata.ucd_3_2_0
    assert len(LOWER) == 675
    for pair in LOWER.items():
        assert "Cn" not in map(known.category, pair)
        assert len({len(letter.encode()) for letter in pair}) == 1


@pytest.mark.skipif(not REAL, reason="no ../shared/data")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_text_comes_back(path):
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in itertools.islice(lines, 300):
            text = json.loads(line)["text"]
            assert decode(encode(text)) == text


# ---- Shards


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Hard texts, among them all that NFKC and white space change, and code."""
    hard = [text for text in ENCODED if text]
    hard += ["\uff21\uff22\ufb01 H\u0331ello", "  A\n\n\tB\u00a0C ", "\u2581 \u2581x\u2581", "\0A"]
    hard += [(ROOT / "data" / "lossless_case.py").read_text()]
    return [f"{text} The END {text}{i}" for i, text in enumerate(hard)]


@pytest.fixture(scope="module")
def model(documents) -> bytes:
    return tokenize_docs.train_tokenizer(documents * 3, 450, transformed=True)


@pytest.fixture(scope="module")
def processor(model) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def tokenize(*argv: object) -> None:
    train_gpt.run_entry_point(lambda: tokenize_docs.main([str(arg) for arg in argv]))


def refused(capsys, *argv: object) -> str:
    """The one line that a run prints which ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        tokenize(*argv)
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    return error


def make(output: Path, texts: list[str], model: bytes, *options: object) -> Path:
    """Tokenize `texts` as validation and, with a word more, as training; return the folder."""
    for name, split in (("val", texts), ("train", [text + " more" for text in texts])):
        lines = [json.dumps({"text": text}) for text in split]
        (output / f"{name}.jsonl").write_text("\n".join(lines))
    (output / "case.model").write_bytes(model)
    inputs = ("--train", output / "train.jsonl", "--val", output / "val.jsonl")
    named = ("--tokenizer", output / "case.model", "--output", output, "--name", "set")
    tokenize(*inputs, *named, *options)
    return output / "datasets" / "set"


@pytest.fixture(scope="module")
def made(tmp_path_factory, documents, model) -> Path:
    """A transformed set whose shards are shorter than a document."""
    output = tmp_path_factory.mktemp("made")
    return make(output, documents, model, "--lossless-case", "--shard-tokens", 497)


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of `made` to be changed."""
    shutil.copytree(made.parents[1], tmp_path / "copy")
    return tmp_path / "copy" / "datasets" / "set"


def joined(folder: Path, pattern: str) -> np.ndarray:
    return np.concatenate([load_data_shard(path) for path in sorted(folder.glob(pattern))])


def as_normalised(processor, text: str) -> str:
    return processor.normalize(text).replace("\u2581", " ")


def slow_sizes(processor, ids: list[int], text: str) -> list[int]:
    """Bytes of `text` by token, one character of it after the other, from the pieces alone."""
    owners = []
    encoded = b""
    for place, token in enumerate(ids):
        piece = processor.id_to_piece(token).replace("\u2581", " ").encode()
        piece = bytes([int(piece[3:5], 16)]) if processor.is_byte(token) else piece
        encoded += piece
        owners += [place] * len(piece)

    sizes = [0] * len(ids)
    original = iter(text)
    at, escaped = 0, False
    for character in encoded.decode():
        width = len(character.encode())
        if character in OPERATORS and not escaped:
            escaped = character == ESC
        else:
            escaped = False
            assert len(next(original).encode()) == width
            for owner in owners[at : at + width]:
                sizes[owner] += 1
        at += width
    assert next(original, None) is None
    return sizes


def test_sidecars_are_those_of_a_slow_reference_token_by_token(made, documents, processor):
    tokens, sizes = joined(made, "fineweb_val_0*"), joined(made, "fineweb_val_bytes_*")
    assert len(list(made.glob("fineweb_val_bytes_*"))) == len(list(made.glob("fineweb_val_0*"))) > 2
    starts = np.flatnonzero(tokens == BOS_ID)
    parts = zip(documents, np.split(tokens, starts)[1:], np.split(sizes, starts)[1:], strict=True)
    for text, ids, part in parts:
        expected = as_normalised(processor, text)
        assert decode(processor.decode(ids.tolist())) == expected
        assert part.tolist() == [0, *slow_sizes(processor, ids[1:].tolist(), expected)]


@exhaustive(150)
@example("H\u0331")
@given(TEXTS)
def test_no_text_is_refused_or_changed_but_by_sentencepiece(model, processor, text):
    (ids,) = lossless_case.CaseTokenizer(model).encode([text], add_bos=True)
    expected = as_normalised(processor, text)
    assert decode(processor.decode(ids)) == expected
    sizes = lossless_case.original_bytes(processor, np.array(ids, "<u2"))
    assert sizes.tolist() == [0, *slow_sizes(processor, ids[1:], expected)]


def test_plain_and_transformed_shards_count_the_same_bytes(
    made, documents, model, processor, tmp_path
):
    plain = joined(make(tmp_path, documents, model), "fineweb_val_*")
    counted = train_gpt.token_bytes(processor, plain).sum()
    assert joined(made, "fineweb_val_bytes_*").sum() == counted > 1000


def test_a_trained_tokenizer_has_the_operators_and_knows_lower_case_alone(processor):
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert pieces[4:8] == list(OPERATORS)
    assert not LOWER.keys() & set("".join(pieces[264:]))


def model_without_bytes(documents: list[str]) -> bytes:
    train = sentencepiece.SentencePieceTrainer.train

    def train_without(**options):
        train(**options | {"byte_fallback": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece.SentencePieceTrainer, "train", train_without)
        return tokenize_docs.train_tokenizer(documents * 3, 300, transformed=True)


def test_tokenizers_that_cannot_hold_the_text_are_refused(documents, tmp_path, capsys):
    (tmp_path / "val.jsonl").write_text('{"text": "A"}')
    inputs = ("--train", tmp_path / "val.jsonl", "--val", tmp_path / "val.jsonl")
    broken = {
        "plain.model: U+E001 to U+E004 are not": tokenize_docs.train_tokenizer(documents, 400),
        "bytes.model: no pieces for bytes": model_without_bytes(documents),
    }
    for said, data in broken.items():
        path = tmp_path / said.partition(":")[0]
        path.write_bytes(data)
        options = ("--tokenizer", path, "--lossless-case", "--output", tmp_path / "out")
        assert said in refused(capsys, *inputs, *options, "--name", "set")
    assert not (tmp_path / "out" / "datasets" / "set").exists()


# ---- Verification


def validation(folder: Path) -> tuple[train_gpt.ValData, sentencepiece.SentencePieceProcessor]:
    """The split and its tokenizer as eval_sliding.py loads them."""
    path = folder.parents[1] / "tokenizers" / "case.model"
    hp = tiny_hp(vocab_size=450, data_path=str(folder), tokenizer_path=str(path))
    return train_gpt.ValData.load(hp, torch.device("cpu")), train_gpt.load_tokenizer(hp)[0]


def test_a_true_set_is_verified_with_and_without_its_manifest(folder, documents, processor, capsys):
    tokenize("--verify", folder)
    said = capsys.readouterr().out
    count = sum(len(as_normalised(processor, text).encode()) for text in documents)
    assert "none in both splits" in said
    assert f"validation has {count:,} bytes of text" in said
    (folder.parents[1] / "manifest.json").unlink()
    unnamed = "does not name its tokenizer; add --tokenizer MODEL"
    assert unnamed in refused(capsys, "--verify", folder)
    tokenize("--verify", folder, "--tokenizer", folder.parents[1] / "case.model")
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("shard", [0, 1, -1])
@pytest.mark.parametrize("place", [0, 7, -1])
@pytest.mark.parametrize("change", [1, -1])
def test_a_sidecar_that_is_off_by_one_anywhere_is_found(shard, place, change, folder, capsys):
    """Also beyond the tokens that are enough to audit a tokenizer; the first BOS is no target."""
    *_, holds = eval_sliding.audit_bytes(*validation(folder), max_tokens=10)
    assert holds
    path = sorted(folder.glob("fineweb_val_bytes_*"))[shard]
    sizes = load_data_shard(path).astype(int)
    sizes[place] += change if sizes[place] else 1
    write_shard(path, sizes)
    assert ", its sidecar states " in refused(capsys, "--verify", folder)
    *_, holds = eval_sliding.audit_bytes(*validation(folder), max_tokens=10)
    assert holds == (shard == place == 0)


def test_a_set_that_is_not_as_its_manifest_states_is_found(folder, capsys):
    path = folder.parents[1] / "manifest.json"
    manifest = json.loads(path.read_text())
    (entry,) = manifest["datasets"]
    assert entry["text_transform"] == lossless_case.NAME

    def refused_with(stats: object) -> str:
        path.write_text(json.dumps(manifest | {"datasets": [entry | {"stats": stats}]}))
        return refused(capsys, "--verify", folder)

    for name, count in entry["stats"].items():
        unit, split = name.split("_")
        said = f"{split} has {count:,} {unit}, the manifest states {count - 1:,}"
        assert said in refused_with(entry["stats"] | {name: count - 1})
    for broken in ([], {"docs_val": "many"}):
        assert "the stats of set are no counts" in refused_with(broken)


def test_fewer_training_shards_are_named_and_missing_sidecars_refused(folder, capsys):
    shards = sorted(folder.glob("fineweb_train_*"))
    shards.pop().unlink()
    tokenize("--verify", folder)
    said = f"{len(shards)} of {len(shards) + 1} training shards are here"
    assert said in capsys.readouterr().out
    for path in folder.glob("fineweb_val_bytes_*"):
        path.unlink()
    said = f"{folder}: lossless case without fineweb_val_bytes_*.bin"
    assert said in refused(capsys, "--verify", folder)
    with pytest.raises(train_gpt.ConfigError, match="lossless case without fineweb_val_bytes"):
        validation(folder)


def test_plain_shards_are_verified_by_their_tokenizer(documents, model, tmp_path, capsys):
    folder = make(tmp_path, [text for text in documents if TITLE not in text], model)
    tokenize("--verify", folder)
    assert capsys.readouterr().out.endswith("by its tokenizer\n")
    for path in folder.glob("fineweb_val_0*"):
        write_shard(path.with_name(path.name.replace("val_", "val_bytes_")), load_data_shard(path))
    assert "validation document 1 has" in refused(capsys, "--verify", folder)

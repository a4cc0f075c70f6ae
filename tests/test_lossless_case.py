"""data/lossless_case.py and the shards made with it.   pytest tests/test_lossless_case.py"""

import json
import shutil
from pathlib import Path

import lossless_case
import numpy as np
import pytest
import sentencepiece
import tokenize_docs
import torch
from conftest import tiny_hp
from helpers_cli import ROOT, Result, assert_refused, run_in_process, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lossless_case import ALLCAPS, CAPNEXT, ESC, LOWER, OPERATORS, TITLE, decode, encode

import eval_sliding
import train_gpt
from train_gpt import load_data_shard

T, A, C, E = TITLE, ALLCAPS, CAPNEXT, ESC
ENCODED = {
    "the quick": "the quick",
    "The Fox": f"{T}the {T}fox",
    "NASA, I'M": f"{A}nasa, {T}i'{T}m",
    "iPhone McDONALD USa": f"i{C}phone {T}mc{C}d{C}o{C}n{C}a{C}l{C}d {T}u{C}sa",
    "A1B x_Y AB2CD": f"{T}a1{T}b x_{T}y {A}ab2{A}cd",
    # One sigma is enough for capitals; the final one is kept.
    "\u039f\u03a3 \u03bf\u03c2": f"{A}\u03bf\u03c3 \u03bf\u03c2",
    "STRASSE Stra\u00dfe STRA\u1e9eE": f"{A}strasse {T}stra\u00dfe {A}stra\u1e9e{T}e",
    "\u0130I \u0131i": f"\u0130{T}i \u0131i",
    "\u01c4\u01c5\u01c6 \u01c5 \u01c4": f"{T}\u01c6\u01c5\u01c6 \u01c5 {T}\u01c6",
    "\u212a \u2126 \u212b \u00b5": "\u212a \u2126 \u212b \u00b5",
    "A\u0301B h\u0331 H\u0331": f"{T}a\u0301{T}b h\u0331 {T}h\u0331",
    f"{T} {E}{E}A{C}": f"{E}{T} {E}{E}{E}{E}{T}a{E}{C}",
    "\ue000\ue005\uf8ff \u10a0 \U00010400": "\ue000\ue005\uf8ff \u10a0 \U00010400",
}
HARD = "aZ \n\0\u00e9\u00c9\u00df\u1e9e\u0130\u0131\u03a3\u03c2\u01c4\u01c5"
HARD += "\u212a\u0301\u0331\uff21\ufb01\u2581"  # which NFKC changes, or joins to a letter
TEXTS = st.text(st.sampled_from([*OPERATORS, *HARD]) | st.characters(codec="utf-8"))


# ---- The transform


@pytest.mark.parametrize("text", ENCODED, ids=ascii)
def test_the_rules_are_those_of_the_readme(text):
    assert encode(text) == ENCODED[text]
    assert decode(ENCODED[text]) == text


@settings(max_examples=500, deadline=None, derandomize=True)
@given(TEXTS)
def test_every_text_comes_back_and_has_no_capital_of_a_pair_before(text):
    encoded = encode(text)
    assert decode(encoded) == text
    assert not LOWER.keys() & set(encoded)


def test_pairs_are_those_of_unicode_3_2_and_of_as_many_bytes():
    """So that every Python decodes the shards of every other, and the audit need not know them."""
    assert len(LOWER) == 675
    assert all(len(pair[0].encode()) == len(pair[1].encode()) for pair in LOWER.items())


# ---- Shards


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Hard texts, among them all that NFKC and white space change, and code."""
    hard = [*ENCODED, (ROOT / "data" / "lossless_case.py").read_text()]
    hard += ["\uff21\uff22\ufb01 H\u0331ello", "  A\n\n\tB\u00a0C ", "\u2581 \u2581x\u2581", "\0A"]
    return [f"{text} The END {text}{i}" for i, text in enumerate(hard)]


@pytest.fixture(scope="module")
def model(documents) -> bytes:
    return tokenize_docs.train_tokenizer(documents * 3, 450, transformed=True)


@pytest.fixture(scope="module")
def processor(model) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def run(*argv: object) -> Result:
    return run_in_process(tokenize_docs.main, {}, ROOT, *argv)


def said_by(*argv: object) -> str:
    """Return what a run prints that succeeds."""
    result = run(*argv)
    assert (result.code, result.err) == (0, "")
    return result.out


@pytest.fixture(scope="module")
def made(tmp_path_factory, documents, model) -> Path:
    """A transformed set whose shards are shorter than a document; training has a word more."""
    output = tmp_path_factory.mktemp("made")
    for name, more in (("val", ""), ("train", " more")):
        lines = [json.dumps({"text": text + more}) for text in documents]
        (output / f"{name}.jsonl").write_text("\n".join(lines))
    (output / "case.model").write_bytes(model)
    inputs = ("--train", output / "train.jsonl", "--val", output / "val.jsonl")
    named = ("--tokenizer", output / "case.model", "--output", output, "--name", "set")
    said_by(*inputs, *named, "--lossless-case", "--shard-tokens", 497)
    return output / "datasets" / "set"


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of `made` to be changed."""
    shutil.copytree(made.parents[1], tmp_path / "copy")
    return tmp_path / "copy" / "datasets" / "set"


def as_normalised(processor, text: str) -> str:
    return processor.normalize(text).replace("\u2581", " ")


@settings(max_examples=150, deadline=None, derandomize=True)
@example("H\u0331")
@given(TEXTS)
def test_no_text_is_refused_or_changed_but_by_sentencepiece(model, processor, text):
    (ids,) = lossless_case.CaseTokenizer(model).encode([text], add_bos=True)
    expected = as_normalised(processor, text)
    assert decode(processor.decode(ids)) == expected
    sizes = lossless_case.original_bytes(processor, np.array(ids, "<u2"))
    assert (sizes[0], sizes.sum()) == (0, len(expected.encode()))


def test_the_operators_are_pieces_of_a_trained_tokenizer_and_needed(
    processor, made, documents, tmp_path
):
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert pieces[4:8] == list(OPERATORS)
    assert not LOWER.keys() & set("".join(pieces[264:]))
    (tmp_path / "plain.model").write_bytes(tokenize_docs.train_tokenizer(documents, 400))
    inputs = ("--train", made.parents[1] / "train.jsonl", "--num-val-docs", 2, "--lossless-case")
    named = ("--tokenizer", tmp_path / "plain.model", "--output", tmp_path, "--name", "set")
    assert_refused(run(*inputs, *named), "plain.model: U+E001 to U+E004 are not")
    assert not (tmp_path / "datasets" / "set").exists()


def validation(folder: Path) -> tuple[train_gpt.ValData, sentencepiece.SentencePieceProcessor]:
    """The split and its tokenizer as eval_sliding.py loads them."""
    path = folder.parents[1] / "tokenizers" / "case.model"
    hp = tiny_hp(vocab_size=450, data_path=str(folder), tokenizer_path=str(path))
    return train_gpt.ValData.load(hp, torch.device("cpu")), train_gpt.load_tokenizer(hp)[0]


def test_a_true_set_is_verified_with_and_without_its_manifest(folder, documents, processor):
    said = said_by("--verify", folder)
    count = sum(len(as_normalised(processor, text).encode()) for text in documents)
    assert "none in both splits" in said
    assert f"validation has {count:,} bytes of text" in said
    (folder.parents[1] / "manifest.json").unlink()
    assert_refused(run("--verify", folder), "does not name its tokenizer; add --tokenizer MODEL")
    model = folder.parents[1] / "case.model"
    assert said_by("--verify", folder, "--tokenizer", model) == said


@pytest.mark.parametrize("shard", [0, 1, -1])
@pytest.mark.parametrize(("place", "change"), [(0, 1), (7, -1), (-1, 1)])
def test_a_sidecar_that_is_off_by_one_anywhere_is_found(shard, place, change, folder):
    """Also beyond the tokens that are enough to audit a tokenizer; the first BOS is no target."""
    *_, holds = eval_sliding.audit_bytes(*validation(folder), max_tokens=10)
    assert holds
    path = sorted(folder.glob("fineweb_val_bytes_*"))[shard]
    sizes = load_data_shard(path).astype(int)
    sizes[place] += change if sizes[place] else 1
    write_shard(path, sizes)
    assert_refused(run("--verify", folder), " by its sidecars")
    *_, holds = eval_sliding.audit_bytes(*validation(folder), max_tokens=10)
    assert holds == (shard == place == 0)


def test_a_set_that_is_not_as_its_manifest_states_is_found_and_fewer_training_shards_named(folder):
    path = folder.parents[1] / "manifest.json"
    manifest = json.loads(path.read_text())
    (entry,) = manifest["datasets"]
    assert entry["text_transform"] == lossless_case.NAME
    wrong = {"the stats of set are no counts": ["many"], "states 'many'": {"docs_val": "many"}}
    for name, count in entry["stats"].items():
        unit, split = name.split("_")
        said = f"{split} has {count} {unit}, the manifest states {count - 1}"
        wrong[said] = entry["stats"] | {name: count - 1}
    for said, stats in wrong.items():
        path.write_text(json.dumps(manifest | {"datasets": [entry | {"stats": stats}]}))
        assert_refused(run("--verify", folder), said)
    path.write_text(json.dumps(manifest))
    shards = sorted(folder.glob("fineweb_train_*"))
    shards.pop().unlink()
    assert f"{len(shards)} of {len(shards) + 1} training shards" in said_by("--verify", folder)


def test_operators_without_sidecars_are_refused_by_all(folder):
    for path in folder.glob("fineweb_val_bytes_*"):
        path.unlink()
    assert_refused(run("--verify", folder), "lossless case without fineweb_val_bytes_*.bin")
    with pytest.raises(train_gpt.ConfigError, match="lossless case without fineweb_val_bytes"):
        validation(folder)

"""Turn documents into a tokenizer, token shards and a manifest in the challenge's layout.

  python data/tokenize_docs.py --train a.jsonl.xz b.jsonl --val c.jsonl.xz \\
      --tokenizer fineweb_1024_bpe.model --output data --name fineweb10B_sp1024
  python data/tokenize_docs.py --train docs.jsonl.zst --num-val-docs 50000 \\
      --train-tokenizer 1024 --name mine_sp1024 --lossless-case
  python data/tokenize_docs.py --verify data/datasets/mine_sp1024

All is explained in data/README.md.
"""

import argparse
import bz2
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lossless_case

import train_gpt
from train_gpt import BOS_ID, ConfigError, Progress, require, run_entry_point, write_atomically

NORMALIZATION = "nmt_nfkc"
SPECIAL_IDS = {"pad_id": 0, "bos_id": BOS_ID, "eos_id": 2, "unk_id": 3}
DEFAULT_SHARD_TOKENS = 100_000_000
COMPRESSED = {  # suffix -> what reads a frame
    ".bz2": bz2.BZ2Decompressor,
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lzma.LZMADecompressor,
    # Its windows may be as large as those of `zstd --long=31`.
    ".zst": zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj,
}
READABLE = re.compile(r".*\.(jsonl(\.bz2|\.gz|\.xz|\.zst)?|parquet|txt|md)", re.IGNORECASE)
CHUNK_BYTES = 1 << 18
MAX_JSON_BYTES = 1 << 20  # of a manifest; as Python objects, text takes up to 50 times its size
BATCH_DOCS = 64  # enough work for every thread of one encode call, and little memory


def say(text: str) -> None:
    """Print a line, unless nobody reads any more, as after `| head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes what is left once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def expand_inputs(paths: Iterable[Path]) -> list[Path]:
    """Return files in reading order, those of a folder sorted. Raises ConfigError."""
    files: list[Path] = []
    for path in paths:
        require(path.exists(), f"{path}: no such file or folder")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in found if READABLE.fullmatch(file.name)]
        kinds = ".jsonl (or .jsonl.bz2, .gz, .xz, .zst), .parquet, .txt or .md"
        require(bool(found), f"{path}: no {kinds}, nor a folder of those")
        files += found
    return files


def frame_lines(raw: io.BufferedReader, new_frame: Callable) -> Iterator[bytes]:
    """Yield the lines of all frames in `raw`. Raises EOFError when the last one is cut short.

    The libraries' own files lose text in silence: bz2.open() and lzma.open() what follows padding
    or a damaged frame, and half a frame is a whole file to zstandard.open().
    """
    frame = None
    rest = b""
    while data := raw.read(CHUNK_BYTES):
        # Between frames may be padding.
        while data := data if frame else data.lstrip(b"\0"):
            frame = frame or new_frame()
            *lines, rest = (rest + frame.decompress(data)).split(b"\n")
            yield from lines
            data = b""
            if frame.eof:
                data = frame.unused_data
                frame = None
    if frame:
        raise EOFError("it is truncated")
    yield rest


def parse_documents(path: Path, raw: io.BufferedReader) -> Iterator[str]:
    """Yield the texts of one open file. Raises ConfigError naming file and line, or row."""
    suffix = path.suffix.lower()
    number = 1
    try:
        if suffix in (".txt", ".md"):
            yield raw.read().decode("utf-8-sig")
        elif suffix == ".parquet":
            from pyarrow import parquet

            for batch in parquet.ParquetFile(raw).iter_batches(columns=["text"]):
                for text in batch.column("text").to_pylist():
                    yield text.encode().decode()
                    number += 1
        else:
            for line in frame_lines(raw, COMPRESSED[suffix]) if suffix in COMPRESSED else raw:
                if line.strip():
                    # Half of a surrogate pair, which JSON may have, is no UTF-8.
                    yield json.loads(line)["text"].encode().decode()
                number += 1
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise ConfigError(f"{path}:{number}: damaged {suffix} file: {error}") from error
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f'{path}:{number}: no "text" in UTF-8: {reason}') from error


def read_documents(files: list[Path]) -> Iterator[str]:
    """Yield the texts of all documents in order, one in memory at a time. Raises ConfigError."""
    finished = 0
    with Progress("reading", sum(path.stat().st_size for path in files)) as progress:
        for path in files:
            with open(path, "rb") as raw:
                for text in parse_documents(path, raw):
                    yield text
                    progress.update(finished + raw.tell(), path.name)
            finished += path.stat().st_size


def train_tokenizer(texts: Iterable[str], vocab_size: int, transformed: bool = False) -> bytes:
    """Train a SentencePiece BPE model of exactly `vocab_size` pieces, and return it serialized.

    The trainer holds its text in memory. Equal texts give equal bytes. The settings are those of
    download_hf_docs_and_tokenize.py in openai/parameter-golf, with a hard limit of pieces and none
    of length. If `transformed`, its symbols have the operators. Raises ConfigError.
    """
    # A NUL is no part of a word.
    sentences = [text.replace("\0", " ") for text in texts]
    if transformed:
        normalizer = spm.SentencePieceNormalizer(
            rule_name=NORMALIZATION, add_dummy_prefix=False, escape_whitespaces=False
        )
        sentences = [lossless_case.encode(text) for text in normalizer.normalize(sentences)]
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name=NORMALIZATION,
            user_defined_symbols=",".join(lossless_case.OPERATORS if transformed else ()),
            add_dummy_prefix=False,
            max_sentence_length=1 << 30,  # bytes; by default, documents over 4,192 are dropped
            minloglevel=2,
            **SPECIAL_IDS,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).rsplit("]", 1)[-1].split()) or "no text to learn from"
        raise ConfigError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from error
    return model.getvalue()


def load_tokenizer(model: bytes, name: str) -> spm.SentencePieceProcessor:
    """Load a serialized model and check what shards and byte counts rely on. Raises ConfigError."""
    try:
        # b"" would pass for a model.
        tokenizer = spm.SentencePieceProcessor(model_proto=model or b"?")
    except RuntimeError as error:
        raise ConfigError(f"{name}: not a SentencePiece model") from error

    fits = tokenizer.vocab_size() <= 1 << 16 and tokenizer.bos_id() == BOS_ID
    require(fits, f"{name}: shards need at most 65,536 pieces, of which BOS is number {BOS_ID}")

    # Without it a lone space counts as the three bytes of U+2581 (openai/parameter-golf #897).
    has_space = not tokenizer.is_unknown(tokenizer.piece_to_id("\u2581"))
    require(has_space, f"{name}: no piece for a space alone (U+2581): bytes would be miscounted")
    return tokenizer


def documents_of(shards: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the token ids of every document of a split, (n,) uint16, of which BOS is the first."""
    rest = np.empty(0, "<u2")
    for shard in shards:
        tokens = np.concatenate([rest, shard])
        *documents, rest = np.split(tokens, np.flatnonzero(tokens == BOS_ID))
        yield from filter(len, documents)
    if len(rest):
        yield rest


def write_shard(path: Path, values: np.ndarray) -> None:
    """Write (n,) uint16 token ids, or the bytes of tokens, behind the challenge's header."""
    header = np.zeros(train_gpt.SHARD_HEADER_INTS, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(values)
    write_atomically(path, b"".join((header, values)))


def encode(
    texts: Iterable[str], tokenizer: spm.SentencePieceProcessor, held_out: set, counts: Counter
) -> Iterator[np.ndarray]:
    """Yield BOS + tokens of every document with text that is not one of `held_out`; count all."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, BATCH_DOCS)):
        encoded = tokenizer.encode(batch, add_bos=True, num_threads=-1)
        for text, ids in zip(batch, encoded, strict=True):
            tokens = np.array(ids, dtype="<u2")
            if len(tokens) == 1:
                counts["empty ones skipped"] += 1
            elif tokens.tobytes() in held_out:
                counts["left out that validation has"] += 1
            else:
                counts["docs"] += 1
                counts["tokens"] += len(tokens)
                counts["bytes"] += len(text.encode())
                yield tokens


def shards_of(documents: Iterable[np.ndarray], shard_tokens: int) -> Iterator[np.ndarray]:
    """Yield all tokens in shards; a document may go on in the next, and the last may be shorter."""
    held = bytearray()
    size = 2 * shard_tokens
    for tokens in documents:
        held += tokens.tobytes()
        while len(held) >= size:
            yield np.frombuffer(held[:size], "<u2")
            del held[:size]
    if held:
        yield np.frombuffer(held, "<u2")


def write_dataset(
    folder: Path,
    model_path: Path,
    model: bytes,
    val: Iterable[str],
    train: Iterable[str],
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    transformed: bool = False,
) -> None:
    """Write tokenizer, shards and manifest; print the counts of each split. Raises ConfigError.

    Training documents that validation has, too, are left out. `folder` has its name when all of it
    is complete. `transformed` is for the lossless case transform, and sidecars beside validation.
    """
    tokenizer = load_tokenizer(model, model_path.name)
    if transformed:
        lossless_case.require_operators(tokenizer, model_path.name)
        tokenizer = lossless_case.CaseTokenizer(model)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    stats = {}
    try:
        staging.mkdir(parents=True)
        for split, texts in (("val", val), ("train", train)):
            written = map(train_gpt.load_data_shard, sorted(staging.iterdir()))
            held_out = {document.tobytes() for document in documents_of(written)}
            counts = Counter()
            tokens = encode(texts, tokenizer, held_out, counts)
            for shard in shards_of(tokens, shard_tokens):
                write_shard(staging / f"fineweb_{split}_{counts['files']:06d}.bin", shard)
                counts["files"] += 1
            require(counts["docs"] > 0, f"the {split} split has no document of its own")
            say(f"{split}: {', '.join(f'{count:,} {unit}' for unit, count in counts.items())}")
            stats |= {f"{unit}_{split}": counts[unit] for unit in ("docs", "files", "tokens")}
        if transformed:
            # In memory, as it is for those who score it.
            shards = map(train_gpt.load_data_shard, train_gpt.list_shards(staging, "val"))
            sizes = lossless_case.original_bytes(tokenizer, np.concatenate(list(shards)))
            for number, shard in enumerate(shards_of([sizes], shard_tokens)):
                write_shard(staging / f"fineweb_val_bytes_{number:06d}.bin", shard)
        write_atomically(model_path, model)
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"wrote {folder} and {model_path}")
    write_manifest(folder, model_path.stem, dict(sorted(stats.items())), transformed)


def read_manifest(path: Path) -> dict:
    """Return a manifest, with empty lists when there is none at `path`. Raises ConfigError."""
    if not path.exists():
        return {"datasets": [], "tokenizers": []}
    readable = path.is_file() and path.stat().st_size <= MAX_JSON_BYTES
    require(readable, f"{path}: not a file of at most {MAX_JSON_BYTES:,} bytes")
    try:
        manifest = json.loads(path.read_bytes())
        # A name that lacks, or what is too deep to be written, is to fail before the work.
        for entry in [*manifest["datasets"], *manifest["tokenizers"]]:
            entry["name"]
        json.dumps(manifest, indent=2)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a manifest of datasets: {error!r}") from error
    return manifest


def write_manifest(folder: Path, tokenizer_name: str, stats: dict, transformed: bool) -> None:
    """Add dataset and tokenizer to the manifest, in the challenge's keys; other entries stay."""
    dataset = {"name": folder.name, "tokenizer_name": tokenizer_name, "stats": stats}
    if transformed:
        dataset["text_transform"] = lossless_case.NAME
    tokenizer = {"name": tokenizer_name, "model_path": f"tokenizers/{tokenizer_name}.model"}

    path = train_gpt.data_root(folder) / "manifest.json"
    manifest = read_manifest(path)
    for key, entry in (("datasets", dataset), ("tokenizers", tokenizer)):
        others = [old for old in manifest[key] if old["name"] != entry["name"]]
        manifest[key] = [*others, entry]
    write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())


def check_counts(folder: Path, split: str, docs: int, stats: dict) -> None:
    """Compare a split with what the manifest states of it. Raises ConfigError."""
    lengths = [train_gpt.shard_length(path) for path in train_gpt.list_shards(folder, split)]
    for unit, count in (("files", len(lengths)), ("tokens", sum(lengths)), ("docs", docs)):
        stated = stats.get(f"{unit}_{split}", count)
        # There may be fewer, as downloaded.
        if (unit, split) == ("files", "train") and isinstance(stated, int) and count < stated:
            say(f"{count} of {stated} training shards are here")
            return
        what = f"{folder}: {split} has {count} {unit}, the manifest states {stated!r}"
        require(count == stated, what)


def check_splits(folder: Path, val: list[np.ndarray]) -> int:
    """Return how many documents are in training, none of them in `val`. Raises ConfigError."""
    held_out = {document.tobytes() for document in val}
    count = 0
    shards = map(train_gpt.load_data_shard, train_gpt.list_shards(folder, "train"))
    with Progress("comparing", 0) as progress:
        for count, document in enumerate(documents_of(shards), 1):
            is_new = document.tobytes() not in held_out
            require(is_new, f"{folder}: training document {count:,} is in validation, too")
            progress.update(0, f"{count:,} training documents")
    both = f"{count:,} training and {len(held_out):,} different validation documents"
    say(f"{folder}: {both}, none in both splits")
    return count


def verify(folder: Path, model_path: Path | None) -> None:
    """Check finished shards, of whatever tool, and print what there is. Raises ConfigError.

    The bytes of every validation document are compared, as decoded, with those that a score
    divides by: its sidecars state them or, without any, the tokenizer.
    """
    folder = folder.absolute()
    output = train_gpt.data_root(folder)
    path = output / "manifest.json"
    manifest = read_manifest(path)
    dataset = next((entry for entry in manifest["datasets"] if entry["name"] == folder.name), {})
    stats = dataset.get("stats", {})
    require(isinstance(stats, dict), f"{path}: the stats of {folder.name} are no counts")
    if model_path is None:
        name = dataset.get("tokenizer_name")
        named = next((entry for entry in manifest["tokenizers"] if entry["name"] == name), {})
        unnamed = f"{folder}: {path} does not name its tokenizer; add --tokenizer MODEL"
        require("model_path" in named, unnamed)
        model_path = output / str(named["model_path"])
    tokenizer = load_tokenizer(model_path.read_bytes(), model_path.name)

    paths = train_gpt.list_shards(folder, "val")
    shards = [train_gpt.load_data_shard(path, tokenizer.vocab_size()) for path in paths]
    documents = list(documents_of(shards))
    require(documents[0][0] == BOS_ID, f"{paths[0]}: does not begin with BOS")
    check_counts(folder, "train", check_splits(folder, documents), stats)
    check_counts(folder, "val", len(documents), stats)

    sizes = train_gpt.load_sidecars(paths, shards, tokenizer)
    transformed = sizes is not None
    by = "sidecars, case undone" if transformed else "tokenizer"
    if transformed:
        lossless_case.require_operators(tokenizer, model_path.name)
    else:
        sizes = np.insert(train_gpt.token_bytes(tokenizer, np.concatenate(shards)), 0, 0)
    end = 0
    with Progress("decoding", len(documents)) as progress:
        for number, document in enumerate(documents, 1):
            text = tokenizer.decode(document.tolist())
            text = lossless_case.decode(text) if transformed else text
            true = len(text.encode())
            start = end
            end += len(document)
            counted = int(sizes[start:end].sum(dtype=np.int64))
            what = f"{folder}: validation document {number:,} has {true:,} bytes of text"
            require(true == counted, f"{what}, {counted:,} by its {by}")
            progress.update(number)
    say(f"validation has {sizes.sum(dtype=np.int64):,} bytes of text, by decoding and by its {by}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; `argv` defaults to the process's own arguments. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train", type=Path, nargs="+", metavar="FILE", help="documents, or folders of them")
    val = parser.add_mutually_exclusive_group().add_argument
    val("--val", type=Path, nargs="+", metavar="FILE", help="validation documents")
    val("--num-val-docs", type=int, metavar="N", help="instead: the first N of --train")
    tokenizer = parser.add_mutually_exclusive_group().add_argument
    tokenizer("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to reuse")
    tokenizer("--train-tokenizer", type=int, metavar="PIECES", help="instead: a new one")
    add("--lossless-case", action="store_true", help="capitals as operators before lower case")
    output = Path(__file__).resolve().parent
    add("--output", type=Path, default=output, metavar="FOLDER", help="default: %(default)s")
    add("--name", help="dataset name, for example fineweb10B_sp1024")
    add("--shard-tokens", type=int, default=DEFAULT_SHARD_TOKENS, metavar="N")
    add("--verify", type=Path, metavar="FOLDER", help="instead of all: check finished shards")
    args = parser.parse_args(argv)
    if args.verify:
        verify(args.verify, args.tokenizer)
        return

    sources = (args.val or args.num_val_docs, args.tokenizer or args.train_tokenizer)
    if not all((args.train, args.name, *sources)):
        parser.error("--train, a validation split, a tokenizer and --name are needed, or --verify")
    if min(args.num_val_docs or 1, args.train_tokenizer or 1, args.shard_tokens) < 1:
        parser.error("a number is less than 1")

    train_files = expand_inputs(args.train)
    val_files = expand_inputs(args.val or [])
    model = args.tokenizer.read_bytes() if args.tokenizer else None

    # Nothing that is there is replaced.
    require(Path(args.name).name == args.name, f"{args.name!r} is not a plain folder name")
    folder = args.output / "datasets" / args.name
    require(not folder.exists(), f"{folder} is there already; delete it, or choose another --name")
    tokenizer_name = args.tokenizer.stem if args.tokenizer else f"{args.name}_bpe"
    model_path = args.output / "tokenizers" / f"{tokenizer_name}.model"
    is_same = not model_path.exists() or model_path.read_bytes() == model
    require(is_same, f"{model_path} is another tokenizer; move it, or change --output")
    read_manifest(args.output / "manifest.json")

    if model is None:
        pieces = args.train_tokenizer
        say(f"training a tokenizer of {pieces:,} pieces on the training documents")
        texts = itertools.islice(read_documents(train_files), args.num_val_docs or 0, None)
        model = train_tokenizer(texts, pieces, args.lossless_case)

    # Validation is read first, because it may be the beginning of the training files.
    train = read_documents(train_files)
    val = read_documents(val_files)
    if args.num_val_docs:
        val = itertools.islice(train, args.num_val_docs)
    write_dataset(folder, model_path, model, val, train, args.shard_tokens, args.lossless_case)


if __name__ == "__main__":
    run_entry_point(main)

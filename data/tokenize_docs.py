"""Turn documents into a tokenizer, token shards and a manifest in the challenge's layout.

  python data/tokenize_docs.py --train a.jsonl.xz b.jsonl --val c.jsonl.xz \\
      --tokenizer fineweb_1024_bpe.model --output data --name fineweb10B_sp1024
  python data/tokenize_docs.py --train docs.jsonl.zst --num-val-docs 50000 \\
      --train-tokenizer 1024 --name mine_sp1024 --lossless-case
  python data/tokenize_docs.py --verify data/datasets/mine_sp1024

Inputs are .jsonl files with {"text": ...} on every line, plain, .bz2, .gz, .xz or .zst, .parquet
files with a column "text", .txt and .md files, or folders of those. A training document that is
a validation document, too, is left out. Formats, and the rules of --lossless-case, which writes
capitals as operators before lower case, are in data/README.md.
"""

import argparse
import bz2
import collections
import functools
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import sentencepiece
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import lossless_case
from lossless_case import CaseTokenizer

import train_gpt
from train_gpt import ConfigError, Progress, require, run_entry_point, write_atomically

SPECIAL_IDS = (0, 1, 2, 3)  # of padding, BOS, EOS and unknown; the challenge's shards assume these
NORMALIZATION = "nmt_nfkc"
MAX_PIECES = 1 << 16  # shards store uint16
DEFAULT_SHARD_TOKENS = 100_000_000
TEXT_SUFFIXES = (".txt", ".md")
COMPRESSED = {  # suffix -> what reads a frame
    ".bz2": bz2.BZ2Decompressor,
    ".gz": functools.partial(zlib.decompressobj, wbits=31),
    ".xz": lzma.LZMADecompressor,
    # Its windows may be as large as those of `zstd --long=31`.
    ".zst": zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj,
}
READABLE = re.compile(r".*\.(jsonl(\.bz2|\.gz|\.xz|\.zst)?|parquet|txt|md)", re.IGNORECASE)
CHUNK_BYTES = 1 << 18
MAX_JSON_BYTES = 1 << 20  # of a manifest; as Python objects, text takes up to 50 times its size
BATCH_DOCS = 64  # enough work for every thread of one encode call, and little memory


@dataclass(frozen=True)
class Destination:
    """Final names of one dataset and of its tokenizer below `output`."""

    output: Path
    name: str
    tokenizer_name: str
    shard_tokens: int = DEFAULT_SHARD_TOKENS

    @property
    def folder(self) -> Path:
        return self.output / "datasets" / self.name

    @property
    def model_path(self) -> Path:
        return self.output / "tokenizers" / f"{self.tokenizer_name}.model"

    def check_free(self, model: bytes | None) -> None:
        """Refuse to touch a dataset, or a tokenizer other than `model`, that is there already."""
        require(Path(self.name).name == self.name, f"{self.name!r} is not a plain folder name")
        is_new = not self.folder.exists()
        require(is_new, f"{self.folder} is there already; delete it, or choose another --name")
        is_same = not self.model_path.exists() or self.model_path.read_bytes() == model
        require(is_same, f"{self.model_path} is another tokenizer; move it, or change --output")


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
        kinds = f".jsonl (plain, {', '.join(COMPRESSED)}), .parquet, {', '.join(TEXT_SUFFIXES)}"
        require(bool(found), f"{path}: not a file of {kinds}, nor a folder of those")
        files += found
    return files


def frame_lines(raw: BinaryIO, new_frame: Callable) -> Iterator[bytes]:
    """Yield the lines of all frames in `raw`. Raises EOFError when the last one is cut short.

    The libraries' own files lose text in silence: lzma.open() what follows padding or a damaged
    frame, zstandard.open() what follows the first frame, and half a frame is a file to it.
    """
    frame = None
    rest = b""
    while data := raw.read(CHUNK_BYTES):
        if frame is None:
            data = data.lstrip(b"\0")
        while data:
            if frame is None:
                frame = new_frame()
            *lines, rest = (rest + frame.decompress(data)).split(b"\n")
            yield from lines
            data = b""
            if frame.eof:
                data = frame.unused_data.lstrip(b"\0")
                frame = None
    if frame is not None:
        raise EOFError
    yield rest


def decode_utf8(data: bytes, where: str) -> str:
    """Decode strict UTF-8 without the byte-order mark that Windows adds. Raises ConfigError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: invalid UTF-8 at byte {error.start}") from error


def parse_line(line: bytes, where: str) -> str:
    """Return the "text" of one JSON line. Raises ConfigError naming `where`."""
    try:
        record = json.loads(decode_utf8(line, where))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: malformed JSON: {error}") from error
    require(isinstance(record, dict) and "text" in record, f'{where}: no "text" key')
    return checked_text(record["text"], where)


def checked_text(text: object, where: str) -> str:
    """Return `text` if UTF-8 can encode it. Raises ConfigError naming `where`."""
    require(isinstance(text, str), f'{where}: "text" is a {type(text).__name__}, not a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: invalid UTF-8: half of a surrogate pair") from error
    return text


def parquet_texts(path: Path) -> Iterator[object]:
    """Yield the column "text" of a Parquet file, as FineWeb is published. Raises ConfigError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path}: pyarrow reads .parquet: pip install pyarrow") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.column("text").to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: no Parquet file with a column of texts: {reason}") from error


def parse_documents(path: Path, raw: BinaryIO) -> Iterator[str]:
    """Yield the texts of one open file. Raises ConfigError naming file and line."""
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        yield decode_utf8(raw.read(), str(path))
        return
    if suffix == ".parquet":
        for number, text in enumerate(parquet_texts(path), 1):
            yield checked_text(text, f"{path}, row {number}")
        return

    lines = frame_lines(raw, COMPRESSED[suffix]) if suffix in COMPRESSED else raw
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_line(line, f"{path}:{number}")
    except EOFError as error:
        raise ConfigError(f"{path}:{number + 1}: truncated {suffix} file") from error
    except (OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise ConfigError(f"{path}:{number + 1}: damaged {suffix} file: {error}") from error


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
    of length. If `transformed`, it learns the text in lower case, and the operators are its first
    symbols. Raises ConfigError.
    """
    # The trainer drops a whole document for one NUL.
    sentences = [text.replace("\0", " ") for text in texts]
    symbols = ""
    if transformed:
        symbols = ",".join(lossless_case.OPERATORS)
        normalizer = sentencepiece.SentencePieceNormalizer(
            rule_name=NORMALIZATION, add_dummy_prefix=False, escape_whitespaces=False
        )
        sentences = [lossless_case.encode(text) for text in normalizer.normalize(sentences)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name=NORMALIZATION,
            user_defined_symbols=symbols,
            add_dummy_prefix=False,
            max_sentence_length=1 << 30,  # bytes; by default, documents over 4,192 are dropped
            pad_id=SPECIAL_IDS[0],
            bos_id=SPECIAL_IDS[1],
            eos_id=SPECIAL_IDS[2],
            unk_id=SPECIAL_IDS[3],
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).rsplit("]", 1)[-1].split()) or "no text to learn from"
        raise ConfigError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from error
    return model.getvalue()


def load_tokenizer(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """Load a serialized model and check what shards and byte counts rely on. Raises ConfigError."""
    try:
        # b"" would pass for a model.
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model or b"?")
    except RuntimeError as error:
        raise ConfigError(f"{name}: not a SentencePiece model") from error

    pieces = tokenizer.vocab_size()
    require(pieces <= MAX_PIECES, f"{name}: {pieces:,} pieces do not fit the uint16 of a shard")
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    expected = f"the challenge needs {SPECIAL_IDS}"
    require(ids == SPECIAL_IDS, f"{name}: special ids (pad, bos, eos, unk) are {ids}, {expected}")

    # Without it a lone space counts as the three bytes of U+2581 (openai/parameter-golf #897).
    has_space = not tokenizer.is_unknown(tokenizer.piece_to_id("\u2581"))
    require(has_space, f"{name}: no piece for a space alone (U+2581): bytes would be miscounted")
    return tokenizer


def document_hash(tokens: np.ndarray) -> bytes:
    """Return a hash of a document's token ids, (n,) uint16, BOS first."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def document_hashes(shards: Iterable[Path]) -> Iterator[bytes]:
    """Yield the hash of every document of a split's shards, in order. Raises ConfigError."""
    rest = np.empty(0, dtype="<u2")
    for path in shards:
        tokens = np.concatenate([rest, train_gpt.load_data_shard(path)])
        starts = np.flatnonzero(tokens == train_gpt.BOS_ID)
        for start, end in itertools.pairwise(starts):
            yield document_hash(tokens[start:end])
        rest = tokens[starts[-1] :] if len(starts) else tokens
    if len(rest):
        yield document_hash(rest)


def write_shard(path: Path, values: np.ndarray) -> None:
    """Write (n,) uint16 token ids, or the bytes of tokens, behind the challenge's header."""
    header = np.zeros(train_gpt.SHARD_HEADER_INTS, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(values)
    write_atomically(path, b"".join((header, values)))


def encode(
    texts: Iterable[str],
    tokenizer: sentencepiece.SentencePieceProcessor | CaseTokenizer,
    held_out: frozenset[bytes],
    counts: collections.Counter,
) -> Iterator[np.ndarray]:
    """Yield BOS + tokens of every document with text that is not one of `held_out`; count all."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, BATCH_DOCS)):
        encoded = tokenizer.encode(batch, add_bos=True, num_threads=-1)
        for text, ids in zip(batch, encoded, strict=True):
            tokens = np.array(ids, dtype="<u2")
            if len(tokens) == 1:
                counts["empty"] += 1
            elif document_hash(tokens) in held_out:
                counts["held out"] += 1
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


def write_sidecars(folder: Path, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """Write beside each validation shard the bytes of original text of its tokens.

    The split is held in memory, as it is by those who score it.
    """
    paths = train_gpt.list_shards(folder, "val")
    shards = [train_gpt.load_data_shard(path) for path in paths]
    sizes = lossless_case.original_bytes(tokenizer, np.concatenate(shards))
    ends = np.cumsum([len(shard) for shard in shards])
    for path, part in zip(paths, np.split(sizes, ends[:-1]), strict=True):
        write_shard(path.with_name(path.name.replace("val_", "val_bytes_")), part)


def write_dataset(
    destination: Destination,
    model: bytes,
    val: Iterable[str],
    train: Iterable[str],
    transformed: bool = False,
) -> None:
    """Write tokenizer, shards and manifest; print the counts of each split. Raises ConfigError.

    Training documents that validation has, too, are left out. The dataset's folder has its name
    when all is complete. `transformed` is for the lossless case transform and its sidecars.
    """
    processor = load_tokenizer(model, destination.model_path.name)
    tokenizer = processor
    if transformed:
        lossless_case.require_operators(processor, destination.model_path.name)
        tokenizer = CaseTokenizer(model)
    staging = destination.folder.with_name(f".{destination.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    stats = {}
    try:
        staging.mkdir(parents=True)
        for split, documents in (("val", val), ("train", train)):
            held_out = frozenset(document_hashes(sorted(staging.iterdir())))
            counts = collections.Counter()
            tokens = encode(documents, tokenizer, held_out, counts)
            for shard in shards_of(tokens, destination.shard_tokens):
                write_shard(staging / f"fineweb_{split}_{counts['files']:06d}.bin", shard)
                counts["files"] += 1
            stats[split] = counts
            require(counts["docs"] > 0, f"the {split} split has no document of its own")
        if transformed:
            write_sidecars(staging, processor)
        write_atomically(destination.model_path, model)
        os.replace(staging, destination.folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for split, counts in stats.items():
        say(
            f"{split}: {counts['docs']:,} documents ({counts['empty']:,} empty ones skipped, "
            f"{counts['held out']:,} left out that validation has), "
            f"{counts['tokens']:,} tokens, {counts['bytes']:,} bytes of text, "
            f"{counts['tokens'] / counts['bytes']:.4f} tokens/byte, {counts['files']:,} shard(s)"
        )
    say(f"wrote {destination.folder} and {destination.model_path}")
    write_manifest(destination, stats, transformed)


def read_manifest(path: Path) -> dict:
    """Return a manifest, with empty lists when there is none at `path`. Raises ConfigError."""
    if not path.exists():
        return {"datasets": [], "tokenizers": []}
    readable = path.is_file() and path.stat().st_size <= MAX_JSON_BYTES
    require(readable, f"{path}: not a file of at most {MAX_JSON_BYTES:,} bytes")
    what = f"{path}: not a manifest of datasets and tokenizers"
    try:
        manifest = json.loads(path.read_bytes())
        names = [entry["name"] for key in ("datasets", "tokenizers") for entry in manifest[key]]
        json.dumps(manifest, indent=2)  # what is too deep for it is to fail before the work
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{what}: {error!r}") from error
    for name in names:
        require(isinstance(name, str) and name.isprintable(), f"{what}: the name {name!r}")
    return manifest


def write_manifest(
    destination: Destination, stats: dict[str, collections.Counter], transformed: bool
) -> None:
    """Add dataset and tokenizer to the manifest, in the challenge's keys; other entries stay."""
    totals = {}
    for unit in ("docs", "files", "tokens"):
        for split in ("train", "val"):
            totals[f"{unit}_{split}"] = stats[split][unit]
    name = destination.tokenizer_name
    entries = {
        "datasets": {"name": destination.name, "tokenizer_name": name, "stats": totals},
        "tokenizers": {"name": name, "model_path": f"tokenizers/{name}.model"},
    }
    if transformed:
        entries["datasets"]["text_transform"] = lossless_case.NAME

    path = destination.output / "manifest.json"
    manifest = read_manifest(path)
    for key, entry in entries.items():
        others = [old for old in manifest[key] if old["name"] != entry["name"]]
        manifest[key] = [*others, entry]
    write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())


def stated_stats(dataset: dict, path: Path) -> dict[str, int]:
    """Return the counts of a manifest's entry, none if it has none. Raises ConfigError."""
    try:
        return {name: int(count) for name, count in dataset.get("stats", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: the stats of {dataset['name']} are no counts") from error


def check_counts(folder: Path, split: str, docs: int, stats: dict[str, int]) -> None:
    """Compare a split with what the manifest states of it. Raises ConfigError.

    There may be fewer training shards, as downloaded.
    """
    lengths = [train_gpt.shard_length(path) for path in train_gpt.list_shards(folder, split)]
    found = {"files": len(lengths), "tokens": sum(lengths), "docs": docs}
    if split == "train" and len(lengths) < stats.get("files_train", 0):
        say(f"{len(lengths)} of {stats['files_train']} training shards are here")
        return
    for unit, count in found.items():
        stated = stats.get(f"{unit}_{split}", count)
        what = f"{folder}: {split} has {count:,} {unit}, the manifest states {stated:,}"
        require(count == stated, what)


def check_splits(folder: Path, stats: dict[str, int]) -> str:
    """Find documents that are in both splits, and compare the counts. Raises ConfigError.

    Returns what there is.
    """
    val = list(document_hashes(train_gpt.list_shards(folder, "val")))
    held_out = frozenset(val)
    count = 0
    repeated = []
    with Progress("hashing", 0) as progress:
        for count, digest in enumerate(document_hashes(train_gpt.list_shards(folder, "train")), 1):
            if digest in held_out:
                repeated.append(count)
            progress.update(0, f"{count:,} training documents, {len(repeated):,} of validation")

    found = f"{folder}: {count:,} training and {len(held_out):,} different validation documents"
    first = f"number {repeated[0]:,} is the first" if repeated else ""
    require(not repeated, f"{found}, {len(repeated):,} of training are in validation, too; {first}")
    check_counts(folder, "val", len(val), stats)
    check_counts(folder, "train", count, stats)
    return f"{found}, none in both splits"


def check_bytes(folder: Path, tokenizer: sentencepiece.SentencePieceProcessor, name: str) -> str:
    """Decode the validation split and compare its bytes with those that a score divides by.

    The sidecars state them or, without any, the tokenizer. Returns what there is. Raises
    ConfigError naming the first document of other bytes.
    """
    paths = train_gpt.list_shards(folder, "val")
    shards = [train_gpt.load_data_shard(path, tokenizer.vocab_size()) for path in paths]
    sizes = train_gpt.load_sidecars(paths, shards, tokenizer)
    transformed = sizes is not None
    tokens = np.concatenate(shards)
    if transformed:
        lossless_case.require_operators(tokenizer, name)
    else:
        sizes = np.concatenate([[0], train_gpt.token_bytes(tokenizer, tokens)])

    starts = np.flatnonzero(tokens == train_gpt.BOS_ID)
    require(starts[:1].tolist() == [0], f"{paths[0]}: does not begin with BOS")
    total = 0
    with Progress("decoding", len(starts)) as progress:
        for number, (start, end) in enumerate(itertools.pairwise([*starts, len(tokens)]), 1):
            text = tokenizer.decode(tokens[start:end].tolist())
            text = lossless_case.decode(text) if transformed else text
            true = len(text.encode())
            counted = int(sizes[start:end].sum(dtype=np.int64))
            source = "its sidecar states" if transformed else "the tokenizer counts"
            what = f"{folder}: validation document {number:,} has {true:,} bytes of text"
            require(true == counted, f"{what}, {source} {counted:,}")
            total += true
            progress.update(number, f"{total / 1e6:.1f} MB")
    by = "sidecars, case undone" if transformed else "tokenizer"
    return f"validation has {total:,} bytes of text, by decoding and by its {by}"


def verify(folder: Path, model_path: Path | None) -> None:
    """Check finished shards, of whatever tool, and print what there is. Raises ConfigError."""
    folder = folder.absolute()
    output = train_gpt.data_root(folder)
    path = output / "manifest.json"
    manifest = read_manifest(path)
    dataset = next((entry for entry in manifest["datasets"] if entry["name"] == folder.name), {})
    if model_path is None:
        name = dataset.get("tokenizer_name")
        models = [
            entry.get("model_path") for entry in manifest["tokenizers"] if entry["name"] == name
        ]
        unnamed = f"{folder}: {path} does not name its tokenizer; add --tokenizer MODEL"
        require(len(models) == 1 and isinstance(models[0], str), unnamed)
        model_path = output / models[0]

    say(check_splits(folder, stated_stats(dataset, path)))
    tokenizer = load_tokenizer(model_path.read_bytes(), model_path.name)
    say(check_bytes(folder, tokenizer, model_path.name))


def positive_int(text: str) -> int:
    """Parse an integer of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options of the command line; a wrong one exits with status 2 and the usage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train", type=Path, nargs="+", metavar="FILE", help="training documents")
    val = parser.add_mutually_exclusive_group().add_argument
    val("--val", type=Path, nargs="+", metavar="FILE", help="validation documents")
    val("--num-val-docs", type=positive_int, metavar="N", help="instead: the first N of --train")
    tokenizer = parser.add_mutually_exclusive_group().add_argument
    tokenizer("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to reuse")
    tokenizer("--train-tokenizer", type=positive_int, metavar="PIECES", help="instead: a new one")
    add("--lossless-case", action="store_true", help="capitals as operators before lower case")
    output = Path(__file__).resolve().parent
    add("--output", type=Path, default=output, metavar="FOLDER", help="default: %(default)s")
    add("--name", help="dataset name, for example fineweb10B_sp1024")
    add("--shard-tokens", type=positive_int, default=DEFAULT_SHARD_TOKENS, metavar="N")
    add("--verify", type=Path, metavar="FOLDER", help="instead of all: check finished shards")
    args = parser.parse_args(argv)

    needed = {
        "--train": args.train,
        "--val or --num-val-docs": args.val or args.num_val_docs,
        "--tokenizer or --train-tokenizer": args.tokenizer or args.train_tokenizer,
        "--name": args.name,
    }
    missing = [option for option, value in needed.items() if not value]
    if missing and not args.verify:
        parser.error(f"these are required, or --verify alone: {', '.join(missing)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command line; `argv` defaults to the process's own arguments. Raises ConfigError."""
    args = parse_arguments(argv)
    if args.verify:
        verify(args.verify, args.tokenizer)
        return

    train_files = expand_inputs(args.train)
    val_files = expand_inputs(args.val or [])

    tokenizer_name = args.tokenizer.stem if args.tokenizer else f"{args.name}_bpe"
    destination = Destination(args.output, args.name, tokenizer_name, args.shard_tokens)
    model = args.tokenizer.read_bytes() if args.tokenizer else None
    destination.check_free(model)
    read_manifest(args.output / "manifest.json")

    if model is None:
        pieces = args.train_tokenizer
        say(f"training a tokenizer of {pieces:,} pieces on the training documents")
        texts = itertools.islice(read_documents(train_files), args.num_val_docs or 0, None)
        model = train_tokenizer(texts, pieces, args.lossless_case)

    # Validation is read first, because it may be the beginning of the training files.
    train_texts = read_documents(train_files)
    val_texts = read_documents(val_files)
    if args.num_val_docs:
        val_texts = itertools.islice(train_texts, args.num_val_docs)
    write_dataset(destination, model, val_texts, train_texts, args.lossless_case)


if __name__ == "__main__":
    run_entry_point(main)

"""Turn documents into a tokenizer, token shards and a manifest in the challenge's layout.

  python data/tokenize_docs.py --train a.jsonl.xz b.jsonl --val c.jsonl.xz --tokenizer path.model \
      --output data --name fineweb10B_sp1024

Inputs are .jsonl files with {"text": ...} on every line (plain, .gz, .xz or .zst), .txt/.md files, or folders of those.
A document becomes BOS + tokens without EOS and may straddle shards, as in openai/parameter-golf. All shards are written
to a hidden folder first and moved to their final names only when every one of them is complete.
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import lzma
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import (
    SHARD_HEADER_INTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    Progress,
    Refusal,
    run_entry_point,
    write_atomically,
)

try:
    import zstandard
except ImportError:
    zstandard = None

SPECIAL_IDS = {
    "pad": 0,
    "bos": 1,
    "eos": 2,
    "unk": 3,
}  # the challenge's shards and its trainers assume these
SPACE_PIECE = "\u2581"
MAX_PIECES = 1 << 16  # shards store uint16
DEFAULT_SHARD_TOKENS = 100_000_000
HEADER_TOKENS = SHARD_HEADER_INTS * 2  # the int32 header seen as uint16
TEXT_SUFFIXES = (".txt", ".md")
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
DECOMPRESSION_ERRORS = (zlib.error, lzma.LZMAError) + ((zstandard.ZstdError,) if zstandard else ())
READ_BYTES = 1 << 18
MAX_JSON_BYTES = 1 << 20  # of a manifest; as Python objects, text takes up to 50 times its size
BATCH_CHARS = (
    1 << 20
)  # enough work for every thread of one encode call, small enough never to matter in memory

EXAMPLES = """examples:
  python data/tokenize_docs.py --train a.jsonl.xz b.jsonl --val c.jsonl.xz \\
      --tokenizer fineweb_1024_bpe.model --output data --name fineweb10B_sp1024
  python data/tokenize_docs.py --train docs.jsonl.zst --num-val-docs 50000 --train-tokenizer 1024 --name mine_sp1024
  python data/tokenize_docs.py --train notes/ --val other_notes/ --train-tokenizer 2048 --name notes_sp2048"""


@dataclass(frozen=True)
class Destination:
    """Final names of one dataset and of its tokenizer below `output`."""

    output: Path
    name: str
    tokenizer_name: str
    overwrite: bool = False
    shard_tokens: int = DEFAULT_SHARD_TOKENS

    @property
    def folder(self) -> Path:
        return self.output / "datasets" / self.name

    @property
    def model_path(self) -> Path:
        return self.output / "tokenizers" / f"{self.tokenizer_name}.model"

    @property
    def manifest_path(self) -> Path:
        return self.output / "manifest.json"

    def shards(self) -> list[Path]:
        """Files that a trainer's globs would read, byte sidecars of the validation split included."""
        return sorted(
            path
            for split in ("train", "val")
            for path in self.folder.glob(f"fineweb_{split}_*.bin")
        )

    def check_free(self, model: bytes | None = None) -> None:
        """Raise Refusal if writing here would replace shards, or a tokenizer other than `model`, unasked."""
        for name in (self.name, self.tokenizer_name):
            if Path(name).name != name:
                raise Refusal(f"{name!r} is not a plain folder or file name")
        if self.overwrite:
            return
        if self.shards():
            raise Refusal(
                f"{self.folder} already holds {len(self.shards())} shards; add --overwrite to replace them"
            )
        if model is not None and self.model_path.exists() and self.model_path.read_bytes() != model:
            raise Refusal(
                f"{self.model_path} is another tokenizer; add --overwrite to replace it or rename this one"
            )


@dataclass
class SplitStats:
    """Totals of one split; `text_bytes` is UTF-8 before SentencePiece normalises it."""

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    text_bytes: int = 0
    files: int = 0

    def line(self, split: str) -> str:
        """One line for people, tokens/byte included."""
        return (
            f"{split}: {self.documents:,} documents ({self.empty:,} empty ones skipped), {self.tokens:,} tokens, "
            f"{self.text_bytes:,} bytes of text, {self.tokens / max(self.text_bytes, 1):.4f} tokens/byte, "
            f"{self.files:,} shard(s)"
        )


@contextlib.contextmanager
def refuse_os_errors() -> Iterator[None]:
    """Turn what the file system answers (missing, unreadable, full) into a one-line Refusal."""
    try:
        yield
    except OSError as error:
        raise Refusal(f"{error.filename or 'file system'}: {error.strerror or error}") from error


def expand_inputs(paths: Iterable[Path]) -> list[Path]:
    """Files in the order they are read; a folder stands for its .txt and .md files, sorted. Raises Refusal."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file()
            )
            if not found:
                raise Refusal(f"{path}: no .txt or .md file in this folder")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise Refusal(f"{path}: no such file or folder")
    return files


def new_decompressor(path: Path):
    """Object that decompresses one frame (.decompress, .eof, .unused_data). Raises Refusal without zstandard."""
    if path.suffix == ".gz":
        return zlib.decompressobj(wbits=31)  # 16 selects the gzip header, 15 the largest window
    if path.suffix == ".xz":
        return lzma.LZMADecompressor()
    if zstandard is None:
        raise Refusal(f"{path}: reading .zst needs the package zstandard")
    return zstandard.ZstdDecompressor(
        max_window_size=1 << 31
    ).decompressobj()  # as far as zstd --long=31 goes


def read_chunks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Decompressed content in pieces; concatenated frames are one file. Raises Refusal if damaged or cut short."""
    decompressor = None
    with open(path, "rb") as file:
        while data := file.read(READ_BYTES):
            on_bytes(len(data))
            if path.suffix not in COMPRESSED_SUFFIXES:
                yield data
                continue
            while data:
                if decompressor is None:
                    data = data.lstrip(
                        b"\0"
                    )  # xz and gzip allow zero padding between and after frames
                    if not data:
                        break
                    decompressor = new_decompressor(path)
                try:
                    yield decompressor.decompress(data)
                except DECOMPRESSION_ERRORS as error:
                    raise Refusal(f"{path}: damaged {path.suffix[1:]} data: {error}") from error
                data = decompressor.unused_data if decompressor.eof else b""
                if decompressor.eof:
                    decompressor = None
    if decompressor is not None:
        raise Refusal(
            f"{path}: truncated {path.suffix[1:]} file: the compressed data ends in the middle"
        )


def read_lines(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Lines without their newline; a last line without one counts."""
    parts: list[
        bytes
    ] = []  # a list, because adding bytes to bytes is quadratic when one line spans many chunks
    for chunk in read_chunks(path, on_bytes):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join([*parts, line])
            parts = []
        parts.append(rest)
    yield b"".join(parts)


def decode_utf8(data: bytes, where: str) -> str:
    """Strict UTF-8; the byte-order mark that Windows editors add is no text. Raises Refusal."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(f"{where}: invalid UTF-8 at byte {error.start}") from error


def parse_line(line: bytes, where: str) -> str:
    """The "text" of one JSON line. Raises Refusal naming `where`."""
    try:
        record = json.loads(decode_utf8(line, where))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{where}: malformed JSON: {error}") from error
    if not isinstance(record, dict) or "text" not in record:
        raise Refusal(f'{where}: no "text" key')
    text = record["text"]
    if not isinstance(text, str):
        raise Refusal(f'{where}: "text" is a {type(text).__name__}, not a string')
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise Refusal(f"{where}: invalid UTF-8: the text escapes half of a surrogate pair")
    return text


def read_documents(
    files: Iterable[Path], on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[str]:
    """Texts of all documents in order, one in memory at a time; `on_bytes` hears of every read. Raises Refusal."""
    for path in files:
        if path.suffix.lower() in TEXT_SUFFIXES:
            data = path.read_bytes()
            on_bytes(len(data))
            yield decode_utf8(data, str(path))
            continue
        for number, line in enumerate(read_lines(path, on_bytes), 1):
            if line.strip():
                yield parse_line(line, f"{path}:{number}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Serialized SentencePiece BPE model with exactly `vocab_size` pieces and the challenge's settings.

    The trainer holds its text in memory. Equal texts give equal bytes. Settings: download_hf_docs_and_tokenize.py of
    openai/parameter-golf, plus the hard limit and no length limit. Raises Refusal.
    """
    failures: list[BaseException] = []

    def sentences() -> Iterator[str]:
        try:
            for text in texts:
                yield text.replace("\0", " ")  # the trainer drops a whole document for one NUL
        except (Exception, KeyboardInterrupt) as error:
            failures.append(
                error
            )  # SentencePiece passes on only the text of an exception, inside its own
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            max_sentence_length=1
            << 30,  # bytes; the default of 4,192 silently drops every longer document
            minloglevel=2,
            **{f"{name}_id": number for name, number in SPECIAL_IDS.items()},
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        reason = " ".join(str(error).rsplit("]", 1)[-1].split()) or "no text to learn from"
        raise Refusal(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from error
    return model.getvalue()


def load_tokenizer(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """Processor for a serialized model after checking what shards and byte counts rely on. Raises Refusal."""
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        if not model or not tokenizer.LoadFromSerializedProto(model):
            raise RuntimeError
    except RuntimeError as error:
        raise Refusal(f"{name}: not a SentencePiece model") from error
    if tokenizer.vocab_size() > MAX_PIECES:
        raise Refusal(
            f"{name}: {tokenizer.vocab_size():,} pieces do not fit the uint16 of a shard ({MAX_PIECES:,})"
        )
    ids = {special: getattr(tokenizer, f"{special}_id")() for special in SPECIAL_IDS}
    if ids != SPECIAL_IDS:
        raise Refusal(f"{name}: special ids are {ids}, the challenge needs {SPECIAL_IDS}")
    space = tokenizer.piece_to_id(SPACE_PIECE)
    if space == ids["unk"] or tokenizer.is_unused(space) or tokenizer.is_control(space):
        # Otherwise a lone space counts as the three bytes of U+2581 (openai/parameter-golf #897).
        raise Refusal(
            f"{name}: no piece for a space alone (U+2581), which would inflate bits-per-byte byte counts"
        )
    return tokenizer


class ShardWriter:
    """Packs the documents of one split into shards of `shard_tokens`; a document may continue in the next shard."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split = folder, split
        self.shard = np.zeros(HEADER_TOKENS + shard_tokens, dtype="<u2")
        self.filled, self.files = 0, 0

    def add(self, tokens: np.ndarray) -> None:
        """Append (n,) token ids, writing every shard that becomes full."""
        while len(tokens):
            start = HEADER_TOKENS + self.filled
            taken = tokens[: len(self.shard) - start]
            self.shard[start : start + len(taken)] = taken
            self.filled += len(taken)
            tokens = tokens[len(taken) :]
            if HEADER_TOKENS + self.filled == len(self.shard):
                self.flush()

    def flush(self) -> None:
        """Write the tokens held so far as one shard, if there are any."""
        if not self.filled:
            return
        self.shard[:HEADER_TOKENS].view("<i4")[:3] = SHARD_MAGIC, SHARD_VERSION, self.filled
        path = self.folder / f"fineweb_{self.split}_{self.files:06d}.bin"
        write_atomically(path, self.shard[: HEADER_TOKENS + self.filled].tobytes())
        self.filled, self.files = 0, self.files + 1


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive texts, about BATCH_CHARS characters at a time."""
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def write_split(
    texts: Iterable[str],
    tokenizer: sentencepiece.SentencePieceProcessor,
    writer: ShardWriter,
    threads: int,
) -> SplitStats:
    """Encode every document as BOS + tokens into `writer`. Raises Refusal when no document has any text."""
    stats = SplitStats()
    for batch in batches(texts):
        for text, ids in zip(
            batch, tokenizer.encode(batch, add_bos=True, num_threads=threads), strict=True
        ):
            if len(ids) == 1:
                stats.empty += 1
                continue
            stats.documents += 1
            stats.tokens += len(ids)
            stats.text_bytes += len(text.encode())
            writer.add(np.array(ids, dtype="<u2"))
    writer.flush()
    stats.files = writer.files
    if not stats.documents:
        raise Refusal(f"the {writer.split} split has no document with text")
    return stats


def write_dataset(
    destination: Destination,
    model: bytes,
    val_texts: Iterable[str],
    train_texts: Iterable[str],
    threads: int,
) -> dict[str, SplitStats]:
    """Tokenizer and shards of both splits, under their final names only once all are complete; val is read first.

    Replaces every shard of an older dataset in the same folder when `destination.overwrite`. Raises Refusal.
    """
    destination.check_free(model)
    tokenizer = load_tokenizer(model, destination.tokenizer_name)
    staging = destination.folder.with_name(f".{destination.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    stats = {}
    try:
        staging.mkdir(parents=True)
        for split, texts in (("val", val_texts), ("train", train_texts)):
            writer = ShardWriter(staging, split, destination.shard_tokens)
            stats[split] = write_split(texts, tokenizer, writer, threads)
        write_atomically(destination.model_path, model)
        destination.folder.mkdir(exist_ok=True)
        for path in destination.shards():
            path.unlink()  # before any new one arrives: an interruption here may leave few shards, never mixed ones
        for path in sorted(staging.iterdir()):
            os.replace(path, destination.folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return stats


def read_manifest(path: Path) -> dict:
    """The manifest already at `path`, with its two lists; empty when there is none. Raises Refusal."""
    if not path.exists():
        return {"tokenizers": [], "datasets": []}
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        raise Refusal(f"{path}: not a file of at most {MAX_JSON_BYTES:,} bytes; move it away first")
    try:
        manifest = json.loads(path.read_bytes())
        named = all(
            isinstance(entry["name"], str)
            for key in ("tokenizers", "datasets")
            for entry in manifest[key]
        )
        json.dumps(
            manifest, indent=2
        )  # what is nested too deeply to be written again is to fail before the work
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refusal(
            f"{path}: not a manifest of datasets and tokenizers; move it away first"
        ) from error
    if not named:
        raise Refusal(f"{path}: a dataset or tokenizer has no name; move it away first")
    return manifest


def write_manifest(
    destination: Destination,
    stats: dict[str, SplitStats],
    vocab_size: int,
    inputs: dict[str, list[str]],
) -> None:
    """Add dataset and tokenizer to the manifest, keeping entries of other names; the keys are the challenge's."""
    path = destination.manifest_path
    manifest = read_manifest(path)
    shared = {
        "vocab_size": vocab_size,
        "bos_id": SPECIAL_IDS["bos"],
        "eos_id": SPECIAL_IDS["eos"],
        "recommended_bigram_vocab_size": -(-vocab_size // 128) * 128 * 5,
    }
    kind, name, tokenizer_name = "sentencepiece_bpe", destination.name, destination.tokenizer_name
    spec = {
        "name": tokenizer_name,
        "kind": kind,
        "dataset_suffix": f"sp{vocab_size}",
        "vocab_size": vocab_size,
    }
    totals = {}
    for unit, key in (("docs", "documents"), ("files", "files"), ("tokens", "tokens")):
        counts = {split: getattr(part, key) for split, part in stats.items()}
        totals[f"{unit}_total"] = sum(counts.values())
        totals.update({f"{unit}_{split}": count for split, count in counts.items()})
    tokenizer_entry = {
        "name": tokenizer_name,
        "kind": kind,
        **shared,
        "source_spec": spec,
        "model_path": f"tokenizers/{tokenizer_name}.model",
    }
    dataset_entry = {
        "name": name,
        "tokenizer_name": tokenizer_name,
        "tokenizer_kind": kind,
        "path": f"datasets/{name}",
        "train_glob": f"datasets/{name}/fineweb_train_*.bin",
        "val_glob": f"datasets/{name}/fineweb_val_*.bin",
        **shared,
        "stats": totals,
    }
    other_tokenizers = [
        entry for entry in manifest["tokenizers"] if entry["name"] != tokenizer_name
    ]
    other_datasets = [entry for entry in manifest["datasets"] if entry["name"] != name]
    manifest = {
        "version": "local",
        "num_docs": totals["docs_total"],
        "num_val_docs": totals["docs_val"],
        "shuffle_seed": None,
        "shard_size": destination.shard_tokens,
        "append_eos": False,
        "docs_jsonl": inputs["train"][0],
        "docs_meta": inputs,
        "tokenizer_specs": [spec],
        "tokenizers": [*other_tokenizers, tokenizer_entry],
        "datasets": [*other_datasets, dataset_entry],
    }
    write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())


@dataclass(frozen=True)
class Corpus:
    """Input files and how they split: by file, or the first `num_val_docs` documents (the challenge's rule)."""

    train_files: list[Path]
    val_files: list[Path]
    num_val_docs: int | None

    def check(self) -> None:
        """Raise Refusal if a file is named twice: in both splits, it would be trained on and then scored."""
        counts = collections.Counter(path.resolve() for path in self.train_files + self.val_files)
        for path, count in counts.items():
            if count > 1:
                raise Refusal(f"{path}: given {count} times; a file belongs to one split, once")

    def val_then_train(self) -> tuple[Iterator[str], Iterator[str]]:
        """Documents of both splits; they may share one reader, so val has to be read to its end first."""
        on_bytes = byte_progress("tokenizing", self.val_files + self.train_files)
        documents = read_documents(self.train_files, on_bytes)
        if self.num_val_docs is None:
            return read_documents(self.val_files, on_bytes), documents
        return itertools.islice(documents, self.num_val_docs), documents

    def training_only(self) -> Iterator[str]:
        """Documents of the training split, which are all that a tokenizer may learn from."""
        documents = read_documents(
            self.train_files, byte_progress("reading for the tokenizer", self.train_files)
        )
        return itertools.islice(documents, self.num_val_docs or 0, None)


def byte_progress(label: str, files: list[Path]) -> Callable[[int], None]:
    """Function to call with the size of every read; draws the share of all bytes of `files` read so far."""
    progress, done = Progress(label, sum(path.stat().st_size for path in files)), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done, "bytes read")

    return on_bytes


def positive_int(text: str) -> int:
    """Integer of at least 1, underscores and all, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line; argparse itself exits with status 2 and its usage on a wrong one."""
    parser = argparse.ArgumentParser(
        description="Turn documents into a tokenizer, token shards and a manifest in the challenge's layout.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--train",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl[.gz|.xz|.zst], .txt, .md, folder",
    )
    val = parser.add_mutually_exclusive_group(required=True)
    val.add_argument("--val", type=Path, nargs="+", metavar="FILE", help="validation documents")
    val.add_argument(
        "--num-val-docs",
        type=positive_int,
        metavar="N",
        help="instead: the first N documents of --train",
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to reuse"
    )
    tokenizer.add_argument(
        "--train-tokenizer",
        type=positive_int,
        metavar="PIECES",
        help="instead: train one on the training split alone",
    )
    add(
        "--tokenizer-train-docs",
        type=positive_int,
        metavar="N",
        help="train it on its first N documents",
    )
    add(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent,
        metavar="FOLDER",
        help="default: %(default)s",
    )
    add("--name", required=True, help="dataset name, for example fineweb10B_sp1024")
    add(
        "--tokenizer-name",
        metavar="NAME",
        help="default: that of --tokenizer, or <dataset name>_bpe",
    )
    add(
        "--shard-tokens",
        type=positive_int,
        default=DEFAULT_SHARD_TOKENS,
        metavar="N",
        help="default: %(default)s",
    )
    add(
        "--threads",
        type=positive_int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="default: all cores",
    )
    add("--overwrite", action="store_true", help="replace the shards that the dataset folder holds")
    return parser.parse_args(argv)


def tokenize(args: argparse.Namespace) -> None:
    """The whole run of the command line. Raises Refusal."""
    started = time.perf_counter()
    corpus = Corpus(expand_inputs(args.train), expand_inputs(args.val or []), args.num_val_docs)
    corpus.check()
    tokenizer_name = args.tokenizer_name or (
        args.tokenizer.stem if args.tokenizer else f"{args.name}_bpe"
    )
    destination = Destination(
        args.output, args.name, tokenizer_name, args.overwrite, args.shard_tokens
    )
    destination.check_free()
    read_manifest(destination.manifest_path)
    if args.tokenizer_train_docs and not args.train_tokenizer:
        raise Refusal("--tokenizer-train-docs needs --train-tokenizer")
    if args.tokenizer:
        model = args.tokenizer.read_bytes()
    else:
        print(
            f"training a tokenizer of {args.train_tokenizer:,} pieces on the training split",
            flush=True,
        )
        model = train_tokenizer(
            itertools.islice(corpus.training_only(), args.tokenizer_train_docs),
            args.train_tokenizer,
        )
    vocab_size = load_tokenizer(model, str(args.tokenizer or tokenizer_name)).vocab_size()
    stats = write_dataset(destination, model, *corpus.val_then_train(), args.threads)
    inputs = {
        "train": [str(path) for path in args.train],
        "val": [str(path) for path in args.val or []],
    }
    write_manifest(destination, stats, vocab_size, inputs)
    for split, part in stats.items():
        print(part.line(split))
    print(
        f"wrote {destination.folder} and {destination.model_path} in {time.perf_counter() - started:.1f} seconds"
    )


def main(argv: list[str] | None = None) -> None:
    """Command line; `argv` defaults to the process's own arguments. Raises Refusal."""
    with refuse_os_errors():
        tokenize(parse_arguments(argv))


if __name__ == "__main__":
    run_entry_point(main)

"""Download the shards and the tokenizer of a FineWeb variant, with the command line of the challenge's own script.

Files go to the challenge's layout: manifest.json, datasets/fineweb10B_<variant>/, tokenizers/. Every run compares what
is there with the repository, by size and checksum: equal files are kept, the manifest is refreshed, interrupted files
go on where they stopped, and a file has its final name only when its checksum and its shard header are right. Shards
that another repository or an older commit gave are replaced if this tool fetched them, and removed if they are more
than you ask for; files that it did not fetch are never touched: the run then refuses and says what is in the way.
datasets/.download.json keeps what was fetched, so that nothing is hashed twice.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import Progress, Refusal, load_data_shard, require, run_entry_point, write_atomically

try:
    import huggingface_hub
    import huggingface_hub.errors
    import huggingface_hub.utils
except ImportError:
    huggingface_hub = None

OFFICIAL_REPO, DEFAULT_PREFIX = "willdepueoai/parameter-golf", "datasets"
RETRY_SECONDS = (1, 2, 4, 8, 16)  # waits between attempts
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
TIMEOUT_SECONDS = 30  # without a byte from the server
THREADS = 4
READ_BYTES = 1 << 20
MAX_JSON_BYTES = (
    1 << 20
)  # of a manifest or ledger; as Python objects, text takes up to 50 times its size
DOCS, DOCS_SOURCE = "docs_selected.jsonl", "docs_selected.source_manifest.json"
NO_ACCESS = "no such dataset repository or file, or private or gated: check MATCHED_FINEWEB_REPO_ID, or set HF_TOKEN"
HINTS = {
    401: NO_ACCESS,
    403: NO_ACCESS,
    404: NO_ACCESS,
    429: "too many requests: wait some minutes, or set HF_TOKEN",
}
COMMUNITY = (
    "other repositories: kevclark/parameter-golf (sp4096, sp8192), romeerp/parameter-golf-caseops-v1 (CaseOps sp8192), "
    "sproos/parameter-golf-tokenizers, LightSpeedUp/parameter-golf-data (sp1024, sp4096, sp8192 in another layout, may "
    "need HF_TOKEN); for example: MATCHED_FINEWEB_REPO_ID=kevclark/parameter-golf "
    "python data/cached_challenge_fineweb.py --variant sp8192 (the validation split of a mirror should be the first "
    "50,000 documents)"
)

EXAMPLES = """examples:
  python data/cached_challenge_fineweb.py                 the validation split and 80 training shards of sp1024
  python data/cached_challenge_fineweb.py 1               one training shard, 200 MB; later, 10 fetches nine more
  python data/cached_challenge_fineweb.py 0 --with-docs   no training shard, but the documents, to tokenize them anew
  MATCHED_FINEWEB_REPO_ID=kevclark/parameter-golf python data/cached_challenge_fineweb.py --variant sp8192
  python data/cached_challenge_fineweb.py --output /scratch/golf    another folder than the script's own

environment:
  MATCHED_FINEWEB_REPO_ID              dataset repository on the hub (willdepueoai/parameter-golf)
  MATCHED_FINEWEB_REMOTE_ROOT_PREFIX   its folder that holds manifest.json (datasets); may be empty
  HF_TOKEN, HF_ENDPOINT                token for private and gated repositories, another hub"""


def shard_flaw(path: Path) -> str | None:
    """What is wrong with the header or length of a shard; None when nothing is."""
    try:
        load_data_shard(path)
    except Refusal as error:
        return str(error).removeprefix(f"{path}: ")
    return None


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository; `path` holds below the repository's prefix and below the local folder alike."""

    path: str
    size: int  # bytes
    digest: str  # SHA-256 if Git LFS has the file, else git's SHA-1

    def digest_of(self, local: Path) -> str:
        """The digest of a local file of this size, of the same kind as this one's."""
        digest = (
            hashlib.sha256() if len(self.digest) == 64 else hashlib.sha1(b"blob %d\0" % self.size)
        )
        with open(local, "rb") as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
        return digest.hexdigest()

    def flaw_of(self, local: Path) -> str | None:
        """What keeps `local` from being a usable copy of this file; None when nothing does."""
        size = local.stat().st_size
        if size != self.size:
            return f"{size:,} bytes instead of {self.size:,}"
        if self.digest_of(local) != self.digest:
            return "its checksum is not the one the repository states"
        return shard_flaw(local) if self.path.endswith(".bin") else None

    def partial(self, local: Path) -> Path:
        """Where the download to `local` collects; named by content, so that only the same content is continued."""
        return local.with_name(f".{local.name}.{self.digest[:16]}.partial")


class Ledger:
    """What this tool has fetched below `root`: digest and source of every file, size and mtime to notice a change."""

    def __init__(self, root: Path):
        self.root, self.path = root, root / "datasets" / ".download.json"
        readable = self.path.is_file() and self.path.stat().st_size <= MAX_JSON_BYTES
        try:
            entries = dict(json.loads(self.path.read_bytes())) if readable else {}
        except (OSError, ValueError, TypeError, RecursionError):
            entries = {}
        self.entries = {
            name: entry
            for name, entry in entries.items()
            if isinstance(entry, dict) and "digest" in entry
        }

    def state(self, local: Path) -> dict[str, int]:
        """What changes when somebody writes to `local`."""
        stat = local.stat()
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}

    def digest(self, local: Path) -> str | None:
        """Digest of a file that is as this tool left it; None for any other."""
        entry = self.entries.get(local.relative_to(self.root).as_posix(), {})
        return entry["digest"] if self.state(local).items() <= entry.items() else None

    def add(self, files: Iterable[RemoteFile], source: str) -> None:
        """Remember `files`, which lie at their final names. Raises Refusal if the ledger cannot be written."""
        for file in files:
            self.entries[file.path] = {
                "digest": file.digest,
                "source": source,
                **self.state(self.root / file.path),
            }
        write_atomically(self.path, (json.dumps(self.entries, indent=1) + "\n").encode())


class Meter:
    """Bytes that all threads have fetched: one line that redraws itself on a terminal, elsewhere a line per file."""

    def __init__(self, total: int):
        self.progress, self.lock, self.stopped = (
            Progress("downloading", total),
            threading.Lock(),
            threading.Event(),
        )

    def add(self, count: int) -> None:
        """Count bytes. Raises Refusal once another thread has failed, to end this one."""
        require(not self.stopped.is_set(), "stopped")
        with self.lock:
            done, total = self.progress.done + count, self.progress.total
            self.progress.update(done, f"{done / 1e9:.2f} of {total / 1e9:.2f} GB")

    def finish(self, file: RemoteFile, number: int, count: int) -> None:
        """Say that the `number`-th of `count` files is complete."""
        if not self.progress.enabled:
            print(f"{file.path} {file.size / 1e6:,.1f} MB, {number} of {count} files", flush=True)

    def stop(self) -> None:
        """End the other threads, and the line on the terminal."""
        self.stopped.set()
        if self.progress.enabled and 0 < self.progress.done < self.progress.total:
            print(file=sys.stderr)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def refuse_hub_errors(what: str) -> Iterator[None]:
    """Turn whatever the hub or the network answers about `what` into a one-line Refusal."""
    try:
        yield
    except huggingface_hub.errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise Refusal(f"{what}: HTTP {status}, {HINTS.get(status, 'try again later')}") from error
    except (huggingface_hub.errors.HTTPError, huggingface_hub.errors.OfflineModeIsEnabled) as error:
        raise Refusal(
            f"{what}: connection failed, {first_line(error)}; the next run goes on from here"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(
            f"{what}: this is not how a Hugging Face hub answers (HF_ENDPOINT): {error!r}"
        ) from error


def with_retries(action: Callable, wait: Callable[[float], object] = time.sleep):
    """Result of `action`, called again, ever later, if the network or a busy server stopped it."""
    for delay in RETRY_SECONDS:
        try:
            return action()
        except huggingface_hub.errors.HTTPError as error:
            answered = isinstance(error, huggingface_hub.errors.HfHubHTTPError)
            if answered and error.response.status_code not in TRANSIENT_STATUS:
                raise
            print(f"{first_line(error)}; trying again in {delay} s", flush=True)
        wait(delay)
    return action()


class Hub:
    """One dataset repository at the commit that was its newest; raises Refusal if it cannot be listed."""

    def __init__(self, repo_id: str, prefix: str, endpoint: str | None):
        huggingface_hub.utils.logging.set_verbosity_error()  # errors are to be one line
        self.repo_id, self.prefix, self.endpoint = repo_id, f"{prefix}/" if prefix else "", endpoint
        api = huggingface_hub.HfApi(endpoint=endpoint)
        with refuse_hub_errors(repo_id):
            info = with_retries(
                lambda: api.dataset_info(repo_id, revision="main", timeout=TIMEOUT_SECONDS)
            )
            self.commit = info.sha
            tree = api.list_repo_tree(
                repo_id, recursive=True, revision=self.commit, repo_type="dataset"
            )
            listed = [entry for entry in tree if isinstance(entry, huggingface_hub.RepoFile)]
        self.manifests = [file.path for file in listed if Path(file.path).name == "manifest.json"]
        self.files = {
            path: RemoteFile(path, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
            for file in listed
            if file.path.startswith(self.prefix) and (path := file.path.removeprefix(self.prefix))
        }

    def file(self, path: str) -> RemoteFile:
        """The file at `path` below the prefix. Raises Refusal when there is none."""
        require(path in self.files, f"{self.repo_id} lacks {self.prefix}{path}")
        return self.files[path]

    def append(self, file: RemoteFile, partial: Path, on_bytes: Callable[[int], None]) -> None:
        """Fetch what `partial` lacks of `file`; an error leaves in it what had arrived."""
        url = huggingface_hub.hf_hub_url(
            self.repo_id,
            self.prefix + file.path,
            repo_type="dataset",
            revision=self.commit,
            endpoint=self.endpoint,
        )
        with open(partial, "r+b") as out:
            start = out.seek(0, os.SEEK_END)
            if start == file.size:
                return
            headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
            headers = huggingface_hub.utils.build_hf_headers(headers=headers)
            session = huggingface_hub.utils.get_session()
            with session.stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
                huggingface_hub.utils.hf_raise_for_status(response)
                if response.status_code != 206:
                    out.truncate(out.seek(0))
                for chunk in response.iter_bytes():
                    on_bytes(len(chunk))
                    out.write(chunk)
                    if out.tell() > file.size:
                        break  # a server that never ends would fill the disk
            out.flush()
            os.fsync(out.fileno())


def fetch(hub: Hub, file: RemoteFile, local: Path, meter: Meter) -> None:
    """Download `file` beside `local`, check it and rename it. Raises Refusal."""
    partial = file.partial(local)
    for other in local.parent.glob(f".{local.name}.*.partial"):
        if other != partial:
            other.unlink()
    resumed = partial.exists()
    partial.touch()
    with refuse_hub_errors(f"{hub.repo_id} {file.path}"):
        with_retries(lambda: hub.append(file, partial, meter.add), meter.stopped.wait)
    flaw = file.flaw_of(partial)
    if flaw is None:
        os.replace(partial, local)
        return
    partial.unlink()
    require(resumed, f"{hub.repo_id} {file.path} arrived damaged: {flaw}")
    fetch(hub, file, local, meter)  # the damage may be in what an earlier run left


def fetch_all(hub: Hub, files: list[RemoteFile], ledger: Ledger) -> None:
    """Download `files` with a few threads; the first failure ends all of them. Raises Refusal."""
    targets = {file: ledger.root / file.path for file in files}
    meter = Meter(sum(file.size - size_of(file.partial(local)) for file, local in targets.items()))
    pool = ThreadPoolExecutor(THREADS)
    futures = {pool.submit(fetch, hub, file, local, meter): file for file, local in targets.items()}
    try:
        for number, future in enumerate(as_completed(futures), 1):
            future.result()
            ledger.add([futures[future]], f"{hub.repo_id}@{hub.commit}")
            meter.finish(futures[future], number, len(files))
    finally:
        meter.stop()
        pool.shutdown(cancel_futures=True)


def load_manifest(hub: Hub, path: Path, skip: bool) -> bytes:
    """The repository's manifest, taken from `path` if that is the same or if `skip`. Raises Refusal."""
    require(path.is_file() or not skip, f"{path}: no such file, and --skip-manifest fetches none")
    if skip:
        require(
            path.stat().st_size <= MAX_JSON_BYTES,
            f"{path}: more than {MAX_JSON_BYTES:,} bytes are no manifest",
        )
        return path.read_bytes()
    where = f"{', '.join(hub.manifests) or 'none elsewhere either'} (MATCHED_FINEWEB_REMOTE_ROOT_PREFIX)"
    require(
        "manifest.json" in hub.files,
        f"{hub.repo_id} has no {hub.prefix}manifest.json, but: {where}",
    )
    file = hub.file("manifest.json")
    require(
        file.size <= MAX_JSON_BYTES, f"{hub.repo_id} has a manifest.json of {file.size:,} bytes"
    )
    if path.is_file() and file.flaw_of(path) is None:
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "manifest.json")
        fetch(hub, file, local, Meter(file.size))
        return local.read_bytes()


def parse_manifest(data: bytes, source: str) -> dict[str, dict[str, dict]]:
    """The manifest's datasets and tokenizers by name. Raises Refusal."""
    try:
        manifest = json.loads(data)
        parsed = {
            kind: {entry["name"]: entry for entry in manifest[kind]}
            for kind in ("datasets", "tokenizers")
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refusal(f"{source}: not a manifest of datasets and tokenizers: {error!r}") from error
    for name in (name for entries in parsed.values() for name in entries):
        plain = isinstance(name, str) and name.isprintable()  # it will be part of one-line messages
        require(plain, f"{source}: not a manifest of datasets and tokenizers: the name {name!r}")
    return parsed


def tokenizer_files(hub: Hub, entry: dict) -> list[RemoteFile]:
    """What the manifest names for a tokenizer; its vocabulary is for people, so it may be missing. Raises Refusal."""
    paths = {key: entry[key] for key in ("model_path", "path", "vocab_path") if entry.get(key)}
    for path in paths.values():
        plain = isinstance(path, str) and bool(
            re.fullmatch(r"tokenizers(/\w[\w.-]*)+", path, re.ASCII)
        )
        shown = (
            type(path).__name__ if isinstance(path, list | dict) else repr(path)
        )  # nested ones may have no repr
        require(
            plain, f"{hub.repo_id}: its manifest has a tokenizer at {shown}, not below tokenizers/"
        )
    if paths.get("vocab_path") not in hub.files:
        paths.pop("vocab_path", None)
    require(
        len(paths) > 0,
        f"{hub.repo_id}: its manifest names no file of the tokenizer {entry['name']}",
    )
    return [hub.file(path) for path in dict.fromkeys(paths.values())]


def select(
    hub: Hub, manifest: dict[str, dict[str, dict]], name: str, train_shards: int
) -> list[RemoteFile]:
    """Files of dataset `name`: tokenizer, whole validation split, first `train_shards` shards. Raises Refusal."""
    known = ", ".join(manifest["datasets"]) or "no dataset"
    require(name in manifest["datasets"], f"{hub.repo_id} has no {name}, only {known}; {COMMUNITY}")
    entry = manifest["datasets"][name]
    try:
        tokenizer = manifest["tokenizers"][entry["tokenizer_name"]]
        counts = {split: int(entry["stats"][f"files_{split}"]) for split in ("val", "train")}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Refusal(f"{hub.repo_id}: incomplete manifest entry of {name}: {error!r}") from error
    available = counts["train"]
    require(
        train_shards <= available,
        f"{hub.repo_id}: {train_shards} training shards of {name}, it has {available}",
    )
    require(counts["val"] > 0, f"{hub.repo_id}: {name} has no validation shard")
    counts["train"] = train_shards
    files = tokenizer_files(hub, tokenizer)
    for split, count in counts.items():
        files += (
            hub.file(f"datasets/{name}/fineweb_{split}_{number:06d}.bin") for number in range(count)
        )
    sidecar = re.compile(rf"datasets/{name}/fineweb_val_bytes_\d+\.bin")
    return files + [file for path, file in hub.files.items() if sidecar.fullmatch(path)]


def size_of(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def split_present(
    hub: Hub, present: list[Path], ledger: Ledger
) -> tuple[set[RemoteFile], list[Path]]:
    """(copies of the repository's files, stale files that are this tool's to remove) among local files.

    Damaged shards are stale. Raises Refusal for intact files that are neither.
    """
    copies, stale, foreign = set(), [], []
    progress = Progress("checking", len(present))
    for number, local in enumerate(present, 1):
        file, digest = (
            hub.files.get(local.relative_to(ledger.root).as_posix()),
            ledger.digest(local),
        )
        if file and (digest == file.digest or file.flaw_of(local) is None):
            copies.add(file)
        elif digest or (local.suffix == ".bin" and shard_flaw(local)):
            stale.append(local)
        else:
            foreign.append(local)
        progress.update(number, local.name)
    named = (
        f"{foreign[0]} and {len(foreign) - 1} more"
        if len(foreign) > 1
        else f"{foreign[0]}"
        if foreign
        else ""
    )
    advice = "delete or move what differs, or name another folder with --output"
    require(not foreign, f"not from {hub.repo_id} and not fetched by this tool: {named}; {advice}")
    return copies, stale


def check_disk_space(needs: dict[Path, int]) -> None:
    """Raise Refusal unless each disk has room for what `needs` adds to it, in bytes by path, negative if freed."""
    disks: dict[int, tuple[Path, int]] = {}
    for path, size in needs.items():
        device = path.parent.stat().st_dev
        folder, total = disks.get(device, (path.parent, 0))
        disks[device] = folder, total + size
    for folder, total in disks.values():
        free = shutil.disk_usage(folder).free
        require(
            total <= free,
            f"{folder}: the download needs {total / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free",
        )


def synchronize(
    hub: Hub, wanted: list[RemoteFile], folder: Path, ledger: Ledger
) -> list[RemoteFile]:
    """Make `wanted` lie at their final names, with no other repository's shard beside; returns what was fetched."""
    root = ledger.root
    for file in wanted:
        (root / file.path).parent.mkdir(parents=True, exist_ok=True)
    present = {root / file.path for file in wanted if (root / file.path).exists()} | set(
        folder.glob("fineweb_*.bin")
    )
    copies, stale = split_present(hub, sorted(present), ledger)
    missing = [file for file in wanted if file not in copies]
    needs = {local: -size_of(local) for local in stale}
    for file in missing:
        local = root / file.path
        needs[local] = needs.get(local, 0) + file.size - size_of(file.partial(local))
    check_disk_space(needs)
    ledger.add(copies, f"{hub.repo_id}@{hub.commit}")
    for local in stale:
        print(f"removing {local}, which is damaged or not what {hub.repo_id} has now", flush=True)
        local.unlink()  # before any other arrives: an interruption may leave few shards, never a mixture
    fetch_all(hub, missing, ledger)
    return missing


def download(args: argparse.Namespace, hub: Hub) -> None:
    """The whole run of the command line. Raises Refusal."""
    started, root, name = time.perf_counter(), args.output, f"fineweb10B_{args.variant}"
    path, folder = root / "manifest.json", root / "datasets" / name
    data = load_manifest(hub, path, args.skip_manifest)
    manifest = parse_manifest(
        data, str(path) if args.skip_manifest else f"{hub.repo_id} {hub.prefix}manifest.json"
    )
    count = args.train_shards if args.shards is None else args.shards
    wanted = select(hub, manifest, name, count)
    if args.with_docs:
        wanted += [
            hub.file(DOCS),
            *(hub.files[path] for path in [DOCS_SOURCE] if path in hub.files),
        ]
    fetched = synchronize(hub, wanted, folder, Ledger(root))
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data)
        print(f"{path} is now that of {hub.repo_id} at {hub.commit[:8]}")
    size, seconds = sum(file.size for file in fetched), time.perf_counter() - started
    print(
        f"fetched {len(fetched)} of {len(wanted)} files, {size / 1e9:.2f} GB, in {seconds:.1f} seconds"
    )
    shards = {
        split: len(list(folder.glob(f"fineweb_{split}_[0-9]*.bin"))) for split in ("val", "train")
    }
    print(f"{folder} holds {shards['val']} validation and {shards['train']} training shards")
    if hub.repo_id != OFFICIAL_REPO:
        print(
            f"{hub.repo_id} is a mirror: the challenge validates on the first 50,000 documents; see that it does too"
        )


def shard_count(text: str) -> int:
    """Integer of at least 0, for argparse."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def main(argv: list[str] | None = None) -> None:
    """Command line; `argv` defaults to the process's own arguments. Raises Refusal."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "shards",
        type=shard_count,
        nargs="?",
        metavar="N",
        help="number of training shards; beats --train-shards",
    )
    add("--variant", default="sp1024", help="sp1024, sp8192, byte260, ...; default: %(default)s")
    add(
        "--train-shards",
        type=shard_count,
        default=80,
        metavar="N",
        help="the first N; default: %(default)s",
    )
    add("--with-docs", action="store_true", help=f"also {DOCS}, the documents themselves")
    add(
        "--skip-manifest",
        action="store_true",
        help="use the manifest.json that is there, whatever the repository has",
    )
    default = Path(__file__).resolve().parent
    add("--output", type=Path, default=default, metavar="FOLDER", help="default: %(default)s")
    args = parser.parse_args(argv)
    require(
        huggingface_hub is not None,
        "downloading needs huggingface_hub: pip install huggingface_hub",
    )
    known = re.fullmatch(r"byte260|sp\d+\w*", args.variant, re.ASCII)
    require(
        known is not None,
        f"--variant {args.variant}: expected byte260 or sp and a size, as in sp1024",
    )
    repo_id = os.environ.get("MATCHED_FINEWEB_REPO_ID", OFFICIAL_REPO)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII)
    require(named is not None, f"MATCHED_FINEWEB_REPO_ID={repo_id}: expected owner/name")
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX).strip("/")
    try:
        download(args, Hub(repo_id, prefix, os.environ.get("HF_ENDPOINT", "").rstrip("/") or None))
    except KeyboardInterrupt as error:
        raise Refusal("interrupted; the same command goes on from here") from error


if __name__ == "__main__":
    run_entry_point(main)

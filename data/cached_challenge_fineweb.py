"""Download the shards and the tokenizer of a FineWeb variant, as the challenge's own script does.

  python data/cached_challenge_fineweb.py                 validation and 80 training shards, sp1024
  python data/cached_challenge_fineweb.py 1               one training shard; later, 10 adds nine
  python data/cached_challenge_fineweb.py 0 --with-docs   the documents, to tokenize them anew
  MATCHED_FINEWEB_REPO_ID=kevclark/parameter-golf python data/cached_challenge_fineweb.py \\
      --variant sp8192                                    from another dataset repository

HF_TOKEN, HF_ENDPOINT and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX are explained in data/README.md.
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

try:
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars, logging
    from huggingface_hub.utils.sha import git_hash, sha_fileobj
except ImportError as error:
    print(f"error: {error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tokenize_docs import MAX_JSON_BYTES, parse_manifest

import train_gpt
from train_gpt import ConfigError, Progress, require, run_entry_point, write_atomically

OFFICIAL_REPO = "willdepueoai/parameter-golf"
THREADS = 4
DOCS = "docs_selected.jsonl"
DOCS_SOURCE = "docs_selected.source_manifest.json"
NO_ACCESS = "no such dataset repository or file, or it needs HF_TOKEN; see MATCHED_FINEWEB_REPO_ID"
MIRRORS = "for other repositories, as MATCHED_FINEWEB_REPO_ID names them, see data/README.md"


def shard_flaw(path: Path) -> str | None:
    """Return what is wrong with the header or length of a shard, or None."""
    try:
        train_gpt.load_data_shard(path)
    except ConfigError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository; `path` is below its prefix and below the output folder alike."""

    path: str
    size: int  # bytes
    digest: str  # SHA-256 of a Git LFS file, git's SHA-1 of any other

    def flaw_of(self, local: Path) -> str | None:
        """Return what keeps `local` from being a usable copy of this file, or None."""
        size = local.stat().st_size
        if size != self.size:
            return f"{size:,} bytes instead of {self.size:,}"

        with open(local, "rb") as file:
            is_lfs = len(self.digest) == 64
            digest = sha_fileobj(file).hex() if is_lfs else git_hash(file.read())
        if digest != self.digest:
            return "its checksum is not the one the repository states"

        return shard_flaw(local) if self.path.endswith(".bin") else None

    def partial(self, local: Path) -> Path:
        """Return where the download to `local` collects; a changed file has another name."""
        return local.with_name(f".{local.name}.{self.digest[:16]}.partial")


@contextlib.contextmanager
def refuse_hub_errors(what: str) -> Iterator[None]:
    """Turn whatever the hub or the network answers about `what` into a one-line ConfigError."""
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = NO_ACCESS if status in (401, 403, 404) else "try again in some minutes"
        raise ConfigError(f"{what}: HTTP {status}, {hint}") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{what}: connection failed, {reason}; the next run goes on") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{what}: no Hugging Face hub answers like this: {error!r}") from error


class Hub:
    """A dataset repository at its newest commit; raises ConfigError if it cannot be listed."""

    def __init__(self, repo_id: str, prefix: str, endpoint: str | None):
        self.repo_id = repo_id
        self.prefix = f"{prefix}/" if prefix else ""
        self.endpoint = endpoint

        # An error is to be one line, and our own progress is shown.
        logging.set_verbosity_error()
        disable_progress_bars()

        # A token that cannot be a header would be quoted by the error about it.
        token = huggingface_hub.get_token() or ""
        require(token.isascii() and token.isprintable(), "HF_TOKEN has characters no token has")

        api = huggingface_hub.HfApi(endpoint=endpoint)
        with refuse_hub_errors(repo_id):
            info = api.dataset_info(repo_id, revision="main", timeout=30, files_metadata=True)
            self.commit = info.sha
            self.files = {}
            for file in info.siblings:
                if file.rfilename.startswith(self.prefix):
                    path = file.rfilename.removeprefix(self.prefix)
                    digest = file.lfs.sha256 if file.lfs else file.blob_id
                    self.files[path] = RemoteFile(path, file.size, digest)

    def file(self, path: str) -> RemoteFile:
        """Return the file at `path` below the prefix. Raises ConfigError when there is none."""
        require(path in self.files, f"{self.repo_id} lacks {self.prefix}{path}")
        return self.files[path]

    def url(self, file: RemoteFile) -> str:
        """Return where the content of `file` is."""
        path = self.prefix + file.path
        return huggingface_hub.hf_hub_url(
            self.repo_id, path, repo_type="dataset", revision=self.commit, endpoint=self.endpoint
        )


def download_file(hub: Hub, file: RemoteFile, local: Path) -> None:
    """Download `file` beside `local`, check it and rename it. Raises ConfigError.

    hf_hub_download would begin an interrupted file again, be it 200 MB of a shard or 48 GB of
    documents; http_get, which is below it, retries and appends.
    """
    partial = file.partial(local)
    with open(partial, "ab") as out, refuse_hub_errors(f"{hub.repo_id} {file.path}"):
        if out.tell() < file.size:
            http_get(hub.url(file), out, resume_size=out.tell(), headers=build_hf_headers())
        out.flush()
        os.fsync(out.fileno())

    flaw = file.flaw_of(partial)
    if flaw:
        partial.unlink()
        raise ConfigError(
            f"{hub.repo_id} {file.path} arrived damaged: {flaw}; the next run retries"
        )
    os.replace(partial, local)


def size_of(path: Path) -> int:
    """Return the bytes of a file, 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:  # perhaps renamed by the thread that downloaded it
        return 0


def download_all(hub: Hub, files: list[RemoteFile], root: Path) -> None:
    """Download `files` with a few threads; the first failure ends all of them."""
    total = sum(file.size for file in files)
    # The pool's threads are daemons: after a failure or Ctrl-C nobody waits for their files.
    with ThreadPool(THREADS) as pool, Progress("downloading", total) as progress:
        jobs = [(hub, file, root / file.path) for file in files]
        pending = [pool.apply_async(download_file, job) for job in jobs]
        while pending:
            pending[0].wait(timeout=0.5)
            for result in pending:
                if result.ready():
                    result.get()
            pending = [result for result in pending if not result.ready()]
            arrived = sum(size_of(path) or size_of(file.partial(path)) for _, file, path in jobs)
            progress.update(arrived, f"{arrived / 1e9:.2f} of {total / 1e9:.2f} GB")


def load_manifest(hub: Hub, path: Path, skip: bool) -> bytes:
    """Return the repository's manifest, or the one at `path` if `skip`. Raises ConfigError."""
    if skip:
        require(path.is_file(), f"{path}: no such file, and --skip-manifest fetches none")
        require(path.stat().st_size <= MAX_JSON_BYTES, f"{path}: too many bytes for a manifest")
        return path.read_bytes()

    where = f"{hub.prefix}manifest.json; set MATCHED_FINEWEB_REMOTE_ROOT_PREFIX to its folder"
    require("manifest.json" in hub.files, f"{hub.repo_id} has no {where}")
    file = hub.file("manifest.json")
    require(file.size <= MAX_JSON_BYTES, f"{hub.repo_id}: a manifest of {file.size:,} bytes")
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "manifest.json")
        download_file(hub, file, local)
        return local.read_bytes()


def tokenizer_files(hub: Hub, entry: dict) -> list[RemoteFile]:
    """Return the files of a tokenizer; its vocabulary may be missing. Raises ConfigError."""
    files = {}
    for key in ("model_path", "path", "vocab_path"):
        path = entry.get(key)
        if not path:
            continue
        # A manifest must not place files elsewhere.
        inside = re.fullmatch(r"tokenizers(/\w[\w.-]*)+", str(path), re.ASCII)
        require(bool(inside), f"{hub.repo_id}: a tokenizer at {path!r}, not below tokenizers/")
        if key != "vocab_path" or path in hub.files:
            files[path] = hub.file(path)
    require(bool(files), f"{hub.repo_id}: no file of the tokenizer {entry['name']} in its manifest")
    return list(files.values())


def select(hub: Hub, manifest: dict, name: str, train_shards: int) -> list[RemoteFile]:
    """Return tokenizer, validation and first training shards of `name`. Raises ConfigError."""
    datasets = {entry["name"]: entry for entry in manifest["datasets"]}
    tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
    known = ", ".join(datasets) or "no dataset"
    require(name in datasets, f"{hub.repo_id} has no {name}, only {known}; {MIRRORS}")
    entry = datasets[name]
    try:
        tokenizer = tokenizers[entry["tokenizer_name"]]
        val_shards = int(entry["stats"]["files_val"])
        available = int(entry["stats"]["files_train"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{hub.repo_id}: bad manifest entry of {name}: {error!r}") from error
    require(val_shards > 0, f"{hub.repo_id}: {name} has no validation shard")
    enough = 0 <= train_shards <= available
    require(enough, f"{hub.repo_id}: {train_shards} training shards of {name}, it has {available}")

    files = tokenizer_files(hub, tokenizer)
    for split, count in (("val", val_shards), ("train", train_shards)):
        for number in range(count):
            files.append(hub.file(f"datasets/{name}/fineweb_{split}_{number:06d}.bin"))

    # Some variants state the bytes of every validation token in shards beside.
    sidecar = re.compile(rf"datasets/{name}/fineweb_val_bytes_\d+\.bin")
    return files + [file for path, file in hub.files.items() if sidecar.fullmatch(path)]


def missing_files(hub: Hub, wanted: list[RemoteFile], folder: Path, root: Path) -> list[RemoteFile]:
    """Return what is not there yet of `wanted`, after removing damaged shards.

    Raises ConfigError, before it removes any, if an intact file differs from the repository's.
    """
    present = {root / file.path for file in wanted if (root / file.path).exists()}
    present = sorted(present | set(folder.glob("fineweb_*.bin")))
    copies, damaged, foreign = [], [], []
    with Progress("checking", len(present)) as progress:
        for number, local in enumerate(present):
            progress.update(number, local.name)
            file = hub.files.get(local.relative_to(root).as_posix())
            if file and file.flaw_of(local) is None:
                copies.append(file)
            elif local.suffix == ".bin" and shard_flaw(local):
                damaged.append(local)
            else:
                foreign.append(local)

    if foreign:
        named = f"{foreign[0]} and {len(foreign) - 1} more" if foreign[1:] else foreign[0]
        advice = "delete or move what differs, or name another folder with --output"
        raise ConfigError(f"not what {hub.repo_id} has now: {named}; {advice}")
    for local in damaged:
        print(f"removing {local}, which is damaged", flush=True)
        local.unlink()
    return [file for file in wanted if file not in copies]


def download(args: argparse.Namespace, hub: Hub) -> None:
    """Run the command line on a listed repository. Raises ConfigError."""
    root = args.output
    name = f"fineweb10B_{args.variant}"
    folder = root / "datasets" / name
    path = root / "manifest.json"

    data = load_manifest(hub, path, args.skip_manifest)
    source = str(path) if args.skip_manifest else f"{hub.repo_id} {hub.prefix}manifest.json"
    count = args.train_shards if args.shards is None else args.shards
    wanted = select(hub, parse_manifest(data, source), name, count)
    if args.with_docs:
        wanted.append(hub.file(DOCS))
        if DOCS_SOURCE in hub.files:
            wanted.append(hub.file(DOCS_SOURCE))

    missing = missing_files(hub, wanted, folder, root)
    for file in wanted:
        (root / file.path).parent.mkdir(parents=True, exist_ok=True)
    needed = sum(file.size - size_of(file.partial(root / file.path)) for file in missing)
    free = shutil.disk_usage(folder).free
    amounts = f"needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free"
    require(needed <= free, f"{folder}: the download {amounts}")
    download_all(hub, missing, root)

    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data)
        print(f"{path} is now that of {hub.repo_id} at {hub.commit[:8]}")
    gigabytes = sum(file.size for file in missing) / 1e9
    print(f"fetched {len(missing)} of {len(wanted)} files, {gigabytes:.2f} GB")
    val_shards = len(list(folder.glob("fineweb_val_[0-9]*.bin")))
    train_shards = len(list(folder.glob("fineweb_train_[0-9]*.bin")))
    print(f"{folder} holds {val_shards} validation and {train_shards} training shards")
    if hub.repo_id != OFFICIAL_REPO:
        print("a mirror: see that its validation split is the first 50,000 documents, too")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; `argv` defaults to the process's own arguments. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", type=int, nargs="?", metavar="N", help="number of training shards")
    add("--variant", default="sp1024", help="sp1024, sp8192, byte260, ...; default: %(default)s")
    add("--train-shards", type=int, default=80, metavar="N", help="default: %(default)s")
    add("--with-docs", action="store_true", help=f"also {DOCS}, the documents themselves")
    add("--skip-manifest", action="store_true", help="use the manifest.json that is there")
    output = Path(__file__).resolve().parent
    add("--output", type=Path, default=output, metavar="FOLDER", help="default: %(default)s")
    args = parser.parse_args(argv)

    known = re.fullmatch(r"byte260|sp\d+\w*", args.variant, re.ASCII)
    require(bool(known), f"--variant {args.variant}: expected byte260 or sp and a size, as sp1024")
    repo_id = os.environ.get("MATCHED_FINEWEB_REPO_ID", OFFICIAL_REPO)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII)
    require(bool(named), f"MATCHED_FINEWEB_REPO_ID={repo_id}: expected owner/name")
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    url = re.fullmatch(r"https?://[\w.-]+(:\d+)?(/\S*)?", endpoint or "https://default", re.ASCII)
    require(bool(url), f"HF_ENDPOINT={endpoint}: expected https://host")
    download(args, Hub(repo_id, prefix, endpoint))


if __name__ == "__main__":
    run_entry_point(main)

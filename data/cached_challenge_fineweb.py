"""Download the shards and the tokenizer of a FineWeb variant, as the challenge's own script does.

  python data/cached_challenge_fineweb.py                 validation and 80 training shards, sp1024
  python data/cached_challenge_fineweb.py 1               one training shard; later, 10 adds nine
  python data/cached_challenge_fineweb.py 0 --with-docs   the documents, to tokenize them anew
  MATCHED_FINEWEB_REPO_ID=kevclark/parameter-golf python data/cached_challenge_fineweb.py \\
      --variant sp8192          from another dataset repository; CaseOps, tokens and other hubs
                                are in data/README.md
"""

import argparse
import contextlib
import os
import re
import sys
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
from tokenize_docs import say

from train_gpt import ConfigError, Progress, require, run_entry_point

OFFICIAL_REPO = "willdepueoai/parameter-golf"
THREADS = 4
DOCS = "docs_selected.jsonl"
NO_ACCESS = "no such dataset repository or file, or it needs HF_TOKEN; see MATCHED_FINEWEB_REPO_ID"
BAD_TOKEN = "the hub refuses the token of HF_TOKEN or `hf auth login`; public data needs none"
NO_HUB = "the network, HF_ENDPOINT, HF_TOKEN or a proxy is amiss; the next run goes on"


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository; `path` is below its prefix and below the output folder alike."""

    path: str
    size: int  # bytes
    digest: str  # SHA-256 of a Git LFS file, git's SHA-1 of any other
    url: str

    def flaw_of(self, local: Path) -> str | None:
        """Return what keeps `local` from being a usable copy of this file, or None."""
        size = local.stat().st_size
        if size != self.size:
            return f"{size:,} bytes instead of {self.size:,}"

        with open(local, "rb") as file:
            is_lfs = len(self.digest) == 64
            digest = sha_fileobj(file).hex() if is_lfs else git_hash(file.read())
        return None if digest == self.digest else "another checksum than the repository states"


@contextlib.contextmanager
def refuse_hub_errors(what: str) -> Iterator[None]:
    """Turn whatever the hub or the network answers about `what` into a one-line ConfigError.

    The text of a library's error is left out: it may quote a token or the password of a proxy.
    """
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = NO_ACCESS if status in (401, 403, 404) else "try again in some minutes"
        if status == 401 and huggingface_hub.get_token():
            hint = BAD_TOKEN
        raise ConfigError(f"{what}: HTTP {status}, {hint}") from error
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of a class of any library below
        # The disk's errors have a number.
        if isinstance(error, OSError) and error.errno:
            raise
        reason = f"connection failed ({type(error).__name__})"
        raise ConfigError(f"{what}: {reason}: {NO_HUB}") from error


class Hub:
    """A dataset repository at its newest commit; raises ConfigError if it cannot be listed."""

    def __init__(self, repo_id: str, prefix: str):
        self.repo_id = repo_id
        self.prefix = f"{prefix}/" if prefix else ""
        self.files: dict[str, RemoteFile] = {}

        # An error is to be one line, and our own progress is shown.
        logging.set_verbosity_error()
        disable_progress_bars()

        with refuse_hub_errors(repo_id):
            api = huggingface_hub.HfApi()
            info = api.dataset_info(repo_id, revision="main", timeout=30, files_metadata=True)
            at = {"repo_type": "dataset", "revision": info.sha, "endpoint": api.endpoint}
            for file in info.siblings:
                if file.rfilename.startswith(self.prefix):
                    path = file.rfilename.removeprefix(self.prefix)
                    digest = file.lfs.sha256 if file.lfs else file.blob_id
                    url = huggingface_hub.hf_hub_url(repo_id, file.rfilename, **at)
                    self.files[path] = RemoteFile(path, file.size, digest, url)


def download_file(hub: Hub, root: Path, file: RemoteFile) -> int:
    """Download `file` below `root`, check and rename it; return its size. Raises ConfigError.

    hf_hub_download would begin an interrupted file again, be it 200 MB of a shard or 48 GB of
    documents; http_get, which is below it, retries and appends.
    """
    name = f"{hub.repo_id} {file.path}"
    local = root / file.path
    # What has changed in the repository collects under another name.
    partial = local.with_name(f".{local.name}.{file.digest[:16]}.partial")
    local.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as out, refuse_hub_errors(name):
        if out.tell() < file.size:
            http_get(file.url, out, resume_size=out.tell(), headers=build_hf_headers())

    flaw = file.flaw_of(partial)
    if flaw:
        partial.unlink()
        raise ConfigError(f"{name} arrived damaged: {flaw}; the next run retries")
    os.replace(partial, local)
    return file.size


def download_all(hub: Hub, files: list[RemoteFile], root: Path) -> None:
    """Download `files` with a few threads; the first failure ends all of them."""
    total = sum(file.size for file in files)
    arrived = 0
    # The pool's threads are daemons: after a failure or Ctrl-C nobody waits for their files.
    with ThreadPool(THREADS) as pool, Progress("downloading", total) as progress:
        for size in pool.imap_unordered(lambda file: download_file(hub, root, file), files):
            arrived += size
            progress.update(arrived, f"{arrived / 1e9:.2f} of {total / 1e9:.2f} GB")


def select(hub: Hub, variant: str, train_shards: int) -> list[RemoteFile]:
    """Return tokenizers, validation and first training shards of `variant`. Raises ConfigError.

    A tokenizer has the number of its pieces, which is that of the variant, in its name.
    """
    kind = re.fullmatch(r"(?:byte|sp)(\d+)\w*", variant, re.ASCII)
    require(kind is not None, f"--variant {variant}: expected byte260 or sp and a size, as sp1024")

    def files_like(pattern: str) -> list[RemoteFile]:
        paths = [path for path in sorted(hub.files) if re.fullmatch(pattern, path, re.ASCII)]
        return [hub.files[path] for path in paths]

    name = f"fineweb10B_{variant}"
    val = files_like(rf"datasets/{name}/fineweb_val_\d+\.bin")
    sidecars = files_like(rf"datasets/{name}/fineweb_val_bytes_\d+\.bin")
    train = files_like(rf"datasets/{name}/fineweb_train_\d+\.bin")
    tokenizers = files_like(rf"tokenizers/(\w[\w.-]*/)*\w+_{kind[1]}[_.][\w.-]*")
    known = sorted({path.split("/")[1] for path in hub.files if path.startswith("datasets/")})
    where = f"{hub.prefix or '/'} (MATCHED_FINEWEB_REMOTE_ROOT_PREFIX)"
    only = f"{', '.join(known) or 'other folders'}; for other repositories, see data/README.md"
    require(bool(val), f"{hub.repo_id} has no {name} in {where}, only {only}")
    require(bool(tokenizers), f"{hub.repo_id} has no tokenizer of {kind[1]} pieces")
    enough = 0 <= train_shards <= len(train)
    require(enough, f"{hub.repo_id}: {train_shards} training shards of {name}, it has {len(train)}")

    # Without its sidecar, transformed text would be scored by the wrong bytes.
    if sidecars or re.search("caseops|lossless", variant):
        stated = {file.path.replace("_val_bytes_", "_val_") for file in sidecars}
        unstated = [file.path for file in val if file.path not in stated]
        require(
            not unstated, f"{hub.repo_id}: no fineweb_val_bytes sidecar of {', '.join(unstated)}"
        )
    return [*tokenizers, *val, *sidecars, *train[:train_shards]]


def missing_files(hub: Hub, wanted: list[RemoteFile], folder: Path, root: Path) -> list[RemoteFile]:
    """Return what is not there yet of `wanted`. Raises ConfigError if a file that is there differs.

    The shards of two repositories must not be mixed, so all in `folder` are compared.
    """
    present = {root / file.path for file in wanted if (root / file.path).exists()}
    present.update(folder.glob("fineweb_*.bin"))
    with Progress("checking", len(present)) as progress:
        for number, local in enumerate(sorted(present)):
            progress.update(number, local.name)
            file = hub.files.get(local.relative_to(root).as_posix())
            flaw = file.flaw_of(local) if file else "no such file in the repository"
            advice = "delete or move what differs, or name another folder with --output"
            require(flaw is None, f"{local} is not what {hub.repo_id} has now: {flaw}; {advice}")
    return [file for file in wanted if root / file.path not in present]


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
    add("--skip-manifest", action="store_true", help="leave the manifest.json that is there")
    output = Path(__file__).resolve().parent
    add("--output", type=Path, default=output, metavar="FOLDER", help="default: %(default)s")
    args = parser.parse_args(argv)

    # What is no name is not shown: people paste addresses with their token.
    repo_id = os.environ.get("MATCHED_FINEWEB_REPO_ID", OFFICIAL_REPO)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII)
    require(bool(named), "MATCHED_FINEWEB_REPO_ID is not of the form owner/name")
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")

    hub = Hub(repo_id, prefix)
    folder = args.output / "datasets" / f"fineweb10B_{args.variant}"
    count = args.train_shards if args.shards is None else args.shards
    wanted = select(hub, args.variant, count)
    if args.with_docs:
        require(DOCS in hub.files, f"{hub.repo_id} has no {hub.prefix}{DOCS}")
        wanted.append(hub.files[DOCS])

    missing = missing_files(hub, wanted, folder, args.output)
    download_all(hub, missing, args.output)
    if "manifest.json" in hub.files and not args.skip_manifest:
        # The one file that may differ: each repository has its own.
        download_file(hub, args.output, hub.files["manifest.json"])
    gigabytes = sum(file.size for file in missing) / 1e9
    say(f"fetched {len(missing)} of {len(wanted)} files, {gigabytes:.2f} GB, into {folder}")
    if hub.repo_id != OFFICIAL_REPO:
        say("a mirror: see that its validation split is the first 50,000 documents, too")


if __name__ == "__main__":
    run_entry_point(main)

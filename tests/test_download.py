"""data/cached_challenge_fineweb.py against a local hub.   pytest tests/test_download.py"""

import collections
import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from helpers_cli import ROOT, Result, assert_refused, run_command, run_in_process, write_shard

sys.path.insert(0, str(ROOT / "data"))
import cached_challenge_fineweb as downloader

REPO, OTHER = "owner/golf", "mirror/golf"
NAME, MODEL = "fineweb10B_sp1024", "fineweb_1024_bpe"
VAL, TRAIN = (f"datasets/{NAME}/fineweb_{split}_%06d.bin" for split in ("val", "train"))
PAGE = 4  # entries in one page of a listing, so that every listing has several


def shard_bytes(tmp_path: Path, seed: int, tokens: int = 500, **broken) -> bytes:
    rng = np.random.default_rng(seed)
    return write_shard(
        tmp_path / "made.bin", rng.integers(1024, size=tokens), **broken
    ).read_bytes()


def digest_of(path: str, data: bytes) -> str:
    if path.endswith(".bin"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Files by path, and what the hub says about them when that is not the truth."""

    files: dict[str, bytes]
    announced: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def tree(self) -> list[dict]:
        """Folders and files as /api/datasets/<repo>/tree/<revision> lists them."""
        folders = {
            str(parent)
            for path in self.files
            for parent in Path(path).parents
            if str(parent) != "."
        }
        entries = [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders
        ]
        for path in self.files:
            data = self.announced.get(path, self.files[path])
            entry = {
                "type": "file",
                "path": path,
                "size": self.sizes.get(path, len(data)),
                "oid": "1" * 40,
            }
            if path.endswith(".bin"):
                entry["lfs"] = {
                    "oid": digest_of(path, data),
                    "size": entry["size"],
                    "pointerSize": 130,
                }
            else:
                entry["oid"] = digest_of(path, data)
            entries.append(entry)
        return sorted(entries, key=lambda entry: entry["path"])


class Hub(ThreadingHTTPServer):
    """A hub on 127.0.0.1; Git LFS files are redirected to another host name, as the real one does."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.errors = collections.defaultdict(
            list
        )  # path -> statuses to answer with, one a request
        self.cut: dict[str, int] = {}  # path -> bytes after which the connection breaks
        self.token, self.meet, self.ranges, self.error_code = None, None, True, None
        self.downloads: list[
            tuple[str, int]
        ] = []  # path and first byte of every file that was sent
        self.sent, self.tokens_elsewhere, self.met = collections.Counter(), [], []
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    """GET of the three addresses that the downloader needs, and the storage that files are redirected to."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in several packets waits 40 ms for an acknowledgement of the first

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        pattern = (
            r"/(api/datasets|datasets|storage)/(\w+/\w+)/(revision|tree|resolve)/(\w+)(?:/(.*))?"
        )
        place, repo_id, kind, revision, name = re.fullmatch(pattern, path).groups()
        repository = self.server.repositories.get(repo_id)
        errors = self.server.errors[name or kind]
        if place == "storage":
            self.server.tokens_elsewhere.append(self.headers["Authorization"])
        elif self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self.answer(401, X_Error_Code="RepoNotFound")
        if repository is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if errors:
            headers = {"X_Error_Code": self.server.error_code} if self.server.error_code else {}
            return self.answer(errors.pop(0), **headers)
        assert revision in ("main", repository.commit)
        if kind == "revision":
            return self.answer(200, json.dumps({"id": repo_id, "sha": repository.commit}).encode())
        if kind == "tree":
            return self.answer_page(repository.tree(), int(query.get("cursor", ["0"])[0]))
        if place == "datasets" and name.endswith(".bin"):
            location = f"http://localhost:{self.server.server_port}/storage{path.removeprefix('/datasets')}"
            return self.answer(302, Location=location, X_Repo_Commit=repository.commit)
        return self.answer_file(name, repository.files[name])

    def answer_page(self, entries: list[dict], start: int) -> None:
        headers = {}
        if start + PAGE < len(entries):
            here = urlsplit(self.path).path
            headers["Link"] = (
                f'<{self.server.url}{here}?recursive=true&cursor={start + PAGE}>; rel="next"'
            )
        self.answer(200, json.dumps(entries[start : start + PAGE]).encode(), **headers)

    def answer_file(self, name: str, data: bytes) -> None:
        if self.server.meet and name.endswith(".bin"):
            with contextlib.suppress(threading.BrokenBarrierError):
                self.server.meet.wait(timeout=5)
                self.server.met.append(name)
        start = (
            int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            * self.server.ranges
        )
        self.server.downloads.append((name, start))
        body = data[start:]
        self.send_response(206 if self.server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        body = body[: self.server.cut.get(name)]
        self.wfile.write(body)
        self.server.sent[name] += len(body)
        if name in self.server.cut:
            self.close_connection = True


def manifest_bytes(
    variant: str = "sp1024", files_train: int = 5, note: str = "", **tokenizer_paths: str
) -> bytes:
    paths = tokenizer_paths or {
        "model_path": f"tokenizers/{MODEL}.model",
        "vocab_path": f"tokenizers/{MODEL}.vocab",
    }
    stats = {"files_val": 2, "files_train": files_train, "tokens_val": 1000}
    manifest = {
        "version": note,
        "datasets": [{"name": f"fineweb10B_{variant}", "tokenizer_name": MODEL, "stats": stats}],
        "tokenizers": [{"name": MODEL, "kind": "sentencepiece_bpe", "vocab_size": 1024, **paths}],
    }
    return json.dumps(manifest).encode()


@pytest.fixture
def content(tmp_path) -> dict[str, bytes]:
    """What a data set consists of, by path below the prefix."""
    files = {VAL % i: shard_bytes(tmp_path, i) for i in range(2)}
    files |= {TRAIN % i: shard_bytes(tmp_path, 10 + i) for i in range(5)}
    files |= {f"tokenizers/{MODEL}.model": b"a model", f"tokenizers/{MODEL}.vocab": b"a\nb\n"}
    files |= {
        "docs_selected.jsonl": b'{"text": "a"}\n',
        "docs_selected.source_manifest.json": b"{}\n",
    }
    return files | {"manifest.json": manifest_bytes(), "tokenizers/unwanted.model": b"another"}


def repository(content: dict[str, bytes], prefix: str = "datasets/") -> Repository:
    return Repository(
        {prefix + path: data for path, data in content.items()} | {"README.md": b"hello"}
    )


@pytest.fixture
def hub(content):
    server = Hub()
    server.repositories[REPO] = repository(content)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub, tmp_path, monkeypatch):
    """Function that runs the command line against `hub` in this process; the last positional options are its own."""
    monkeypatch.setattr(downloader, "RETRY_SECONDS", (0, 0))

    def run(*argv: object, output: str = "out", **env: str) -> Result:
        env = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "MATCHED_FINEWEB_REPO_ID": REPO,
        } | env
        result = run_in_process(
            downloader.main, env, tmp_path, *argv, "--output", tmp_path / output
        )
        assert not list(tmp_path.rglob("home/hub/*")), "nothing goes through the library's cache"
        return result

    return run


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file but the ledger, by path; partial ones too."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".download.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def expected(content: dict[str, bytes], train_shards: int, *extra: str) -> dict[str, bytes]:
    paths = [
        "manifest.json",
        *(VAL % i for i in range(2)),
        *(TRAIN % i for i in range(train_shards)),
        *extra,
    ]
    return {
        path: content[path]
        for path in [*paths, f"tokenizers/{MODEL}.model", f"tokenizers/{MODEL}.vocab"]
    }


def ok(result: Result) -> Result:
    assert (result.code, result.err) == (0, "")
    return result


def test_the_layout_is_the_challenge_s_and_a_second_run_fetches_nothing(
    run, hub, content, tmp_path
):
    result = ok(run(3))
    assert files_below(tmp_path / "out") == expected(content, 3)
    assert "fetched 7 of 7 files" in result.out
    assert "holds 2 validation and 3 training shards" in result.out
    assert f"{TRAIN % 2} 0.0 MB, " in result.out
    hub.downloads.clear()
    assert "fetched 0 of 7 files" in ok(run(3)).out
    assert hub.downloads == []
    assert files_below(tmp_path / "out") == expected(content, 3)


def test_only_what_is_missing_is_fetched_when_the_number_grows(run, hub, content, tmp_path):
    ok(run(1))
    hub.downloads.clear()
    ok(run("--train-shards", 4))
    assert sorted(hub.downloads) == [(f"datasets/{TRAIN % i}", 0) for i in (1, 2, 3)]
    hub.downloads.clear()
    assert "holds 2 validation and 4 training shards" in ok(run(0)).out
    assert hub.downloads == []
    assert files_below(tmp_path / "out") == expected(content, 4)


def test_the_positional_number_wins_and_0_fetches_the_validation_split_alone(
    run, content, tmp_path
):
    ok(run(0, "--train-shards", 4))
    assert files_below(tmp_path / "out") == expected(content, 0)


def test_more_shards_than_there_are_is_refused_and_the_default_is_80(run, hub, tmp_path):
    assert_refused(run(6), "6 training shards", "it has 5")
    assert_refused(run(), "80 training shards", "it has 5")
    assert files_below(tmp_path / "out") == {}
    ok(run(5))


def test_a_negative_or_unreadable_number_is_a_usage_error(run):
    for count in ("-1", "many"):
        result = run("--train-shards", count)
        assert result.code == 2
        assert "usage: " in result.err


def test_with_docs_fetches_the_documents_and_their_source(run, hub, content, tmp_path):
    docs = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
    ok(run(0, "--with-docs"))
    assert files_below(tmp_path / "out") == expected(content, 0, *docs)
    del hub.repositories[REPO].files["datasets/docs_selected.source_manifest.json"]
    ok(run(0, "--with-docs", output="again"))
    assert files_below(tmp_path / "again") == expected(content, 0, docs[0])
    del hub.repositories[REPO].files["datasets/docs_selected.jsonl"]
    assert_refused(run(0, "--with-docs"), "lacks datasets/docs_selected.jsonl")


def test_byte_sidecars_of_the_validation_split_come_along(run, hub, content, tmp_path):
    sidecars = {
        f"datasets/{NAME}/fineweb_val_bytes_{i:06d}.bin": shard_bytes(tmp_path, 20 + i)
        for i in range(2)
    }
    hub.repositories[REPO] = repository(content | sidecars)
    assert "holds 2 validation" in ok(run(1)).out
    assert files_below(tmp_path / "out") == expected(content | sidecars, 1, *sidecars)


def test_the_prefix_may_be_empty_or_another_and_a_wrong_one_is_answered_with_the_right_one(
    run, hub, content, tmp_path
):
    for number, prefix in enumerate(("", "some/where/")):
        hub.repositories[REPO] = repository(content, prefix)
        ok(run(1, output=f"{number}", MATCHED_FINEWEB_REMOTE_ROOT_PREFIX=prefix))
        assert files_below(tmp_path / f"{number}") == expected(content, 1)
    variable = "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"
    assert_refused(run(1), "no datasets/manifest.json", "some/where/manifest.json", variable)


def test_byte260_and_suffixed_variants_are_accepted_and_others_refused_by_name(
    run, hub, content, tmp_path
):
    for variant in ("byte260", "sp8192_caseops"):
        name = f"fineweb10B_{variant}"
        files = {path.replace(NAME, name): data for path, data in content.items()} | {
            "manifest.json": manifest_bytes(variant, path="tokenizers/sub/bytes.json"),
            "tokenizers/sub/bytes.json": b"{}",
        }
        hub.repositories[REPO] = repository(files)
        ok(run(1, "--variant", variant, output=variant))
        assert f"datasets/{name}/fineweb_train_000000.bin" in files_below(tmp_path / variant)
        assert (tmp_path / variant / "tokenizers" / "sub" / "bytes.json").read_bytes() == b"{}"
    hub.downloads.clear()
    for variant in ("gpt2", "sp", "byte261", "sp1024/../x", "../sp1024"):
        assert_refused(run(1, "--variant", variant), f"--variant {variant}: ")
    assert hub.downloads == []


def test_an_unknown_variant_is_answered_with_what_there_is_and_who_has_more(run, tmp_path):
    command = "MATCHED_FINEWEB_REPO_ID=kevclark/parameter-golf python data/cached_challenge_fineweb.py --variant sp8192"
    others = (
        "romeerp/parameter-golf-caseops-v1",
        "sproos/parameter-golf-tokenizers",
        "LightSpeedUp/parameter-golf-",
    )
    fragments = (f"{REPO} has no fineweb10B_sp8192, only {NAME}", command, "first 50,000")
    assert_refused(run(1, "--variant", "sp8192"), *fragments, *others)
    assert files_below(tmp_path / "out") == {}


def test_a_changed_manifest_is_refreshed_without_fetching_shards_again(run, hub, content, tmp_path):
    ok(run(1))
    hub.repositories[REPO].files["datasets/manifest.json"] = manifest_bytes(note="newer")
    hub.downloads.clear()
    result = ok(run(1))
    assert f"manifest.json is now that of {REPO}" in result.out
    assert hub.downloads == [("datasets/manifest.json", 0)]
    assert files_below(tmp_path / "out") == expected(content, 1) | {
        "manifest.json": manifest_bytes(note="newer")
    }


def test_another_repository_replaces_what_the_first_gave_and_keeps_what_is_equal(
    run, hub, content, tmp_path
):
    ok(run(4))
    changed = {TRAIN % i: shard_bytes(tmp_path, 30 + i) for i in range(5)}
    changed["manifest.json"] = manifest_bytes(note="mirror")
    hub.repositories[OTHER] = repository(content | changed)
    hub.downloads.clear()
    result = ok(run(2, MATCHED_FINEWEB_REPO_ID=OTHER))
    assert sorted(path for path, _ in hub.downloads) == sorted(
        f"datasets/{path}" for path in (TRAIN % 0, TRAIN % 1, "manifest.json")
    )
    assert files_below(tmp_path / "out") == expected(content | changed, 2)
    assert result.out.count("removing ") == 4
    assert f"{OTHER} is a mirror" in result.out
    assert "50,000" in result.out


def test_stale_shards_are_gone_before_the_first_new_one_arrives(run, hub, content, tmp_path):
    ok(run(3))
    hub.repositories[REPO].files |= {
        f"datasets/{TRAIN % i}": shard_bytes(tmp_path, 40 + i) for i in range(3)
    }
    hub.errors[f"datasets/{TRAIN % 0}"] = [500] * 3
    assert_refused(run(3), "HTTP 500", TRAIN % 0)
    for path, data in files_below(tmp_path / "out").items():
        if "_train_" in path and not path.endswith(".partial"):
            assert data == hub.repositories[REPO].files[f"datasets/{path}"]
    ok(run(3))


@pytest.mark.parametrize("path", [TRAIN % 0, TRAIN % 7, f"tokenizers/{MODEL}.model"])
def test_files_that_this_tool_did_not_fetch_are_neither_replaced_nor_trained_on(
    path, run, hub, content, tmp_path
):
    local = tmp_path / "out" / path
    local.parent.mkdir(parents=True)
    local.write_bytes(shard_bytes(tmp_path, 50))
    for _ in range(2):
        assert_refused(run(1), f"{local};", REPO, "--output")
        assert local.read_bytes() == shard_bytes(tmp_path, 50)
    local.unlink()
    ok(run(1))
    local.write_bytes(shard_bytes(tmp_path, 51))
    assert_refused(run(1), f"{local};", "not fetched by this tool")


def test_equal_files_of_another_tool_are_adopted_and_hashed_once(
    run, hub, content, tmp_path, monkeypatch
):
    for path, data in expected(content, 2).items():
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / path).write_bytes(data)
    ok(run(2))
    assert hub.downloads == []
    hashed, digest_of = [], downloader.RemoteFile.digest_of
    monkeypatch.setattr(
        downloader.RemoteFile,
        "digest_of",
        lambda file, local: hashed.append(local.name) or digest_of(file, local),
    )
    ok(run(2))
    assert hashed == ["manifest.json"]
    (tmp_path / "out" / (TRAIN % 0)).touch()
    ok(run(2))
    assert hashed[1:] == ["manifest.json", "fineweb_train_000000.bin"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: b"\0" * len(data), lambda data: b""]
)
def test_a_local_shard_that_is_damaged_is_fetched_again(damage, run, hub, content, tmp_path):
    ok(run(2))
    local = tmp_path / "out" / (TRAIN % 1)
    local.write_bytes(damage(content[TRAIN % 1]))
    hub.downloads.clear()
    assert f"removing {local}" in ok(run(2)).out
    assert hub.downloads == [(f"datasets/{TRAIN % 1}", 0)]
    assert files_below(tmp_path / "out") == expected(content, 2)


def test_a_damaged_ledger_costs_a_check_and_nothing_else(run, hub, content, tmp_path):
    ok(run(1))
    for text in ("{", "[1, 2]", "null"):
        (tmp_path / "out" / "datasets" / ".download.json").write_text(text)
        assert "fetched 0 of 5" in ok(run(1)).out


def test_a_server_that_dies_half_way_is_resumed_where_it_stopped(run, hub, content, tmp_path):
    path = f"datasets/{TRAIN % 0}"
    hub.cut[path] = 600
    assert_refused(run(1), TRAIN % 0, "connection failed", "goes on")
    starts = [start for name, start in hub.downloads if name == path]
    assert starts == [0, 600, 1200]
    assert TRAIN % 0 not in files_below(tmp_path / "out")
    hub.cut.clear()
    hub.downloads.clear()
    ok(run(1))
    assert [start for name, start in hub.downloads if name == path] == [1800]
    assert hub.sent[path] == len(content[TRAIN % 0])
    assert files_below(tmp_path / "out") == expected(content, 1)


def test_a_server_without_ranges_starts_the_file_again(run, hub, content, tmp_path):
    path = f"datasets/{TRAIN % 0}"
    hub.cut[path] = 600
    assert_refused(run(1), "connection failed")
    hub.cut.clear()
    hub.downloads.clear()
    hub.ranges = False
    ok(run(1))
    assert [name for name, _ in hub.downloads].count(path) == 1
    assert files_below(tmp_path / "out") == expected(content, 1)


def test_a_partial_file_of_other_content_is_not_continued(run, hub, content, tmp_path):
    path = f"datasets/{TRAIN % 0}"
    hub.cut[path] = 300
    assert_refused(run(1), "connection failed")
    assert [name for name in files_below(tmp_path / "out") if name.endswith(".partial")]
    hub.cut.clear()
    hub.downloads.clear()
    hub.repositories[REPO].files[path] = changed = shard_bytes(tmp_path, 60)
    ok(run(1))
    assert (path, 0) in hub.downloads
    assert files_below(tmp_path / "out") == expected(content | {TRAIN % 0: changed}, 1)


def test_a_partial_file_that_was_damaged_is_thrown_away_and_fetched_whole(
    run, hub, content, tmp_path
):
    hub.cut[f"datasets/{TRAIN % 0}"] = 300
    assert_refused(run(1), "connection failed")
    (partial,) = (tmp_path / "out").rglob("*.partial")
    partial.write_bytes(b"\0" * partial.stat().st_size)
    hub.cut.clear()
    ok(run(1))
    assert files_below(tmp_path / "out") == expected(content, 1)


def test_content_that_is_not_what_was_announced_never_gets_a_final_name(
    run, hub, content, tmp_path
):
    path, truth = f"datasets/{TRAIN % 0}", content[TRAIN % 0]
    for served, flaw in ((truth[:-100], "1,924 bytes instead of 2,024"), (truth[::-1], "checksum")):
        hub.repositories[REPO].announced[path] = truth
        hub.repositories[REPO].files[path] = served
        assert_refused(run(1), TRAIN % 0, "damaged", flaw)
        assert not list((tmp_path / "out" / "datasets" / NAME).glob("*train*"))
    hub.repositories[REPO].files[path] = truth
    ok(run(1))
    assert files_below(tmp_path / "out") == expected(content, 1)


def test_a_server_that_sends_more_than_it_announced_is_cut_off(
    run, hub, content, tmp_path, monkeypatch
):
    path, truth, received, add = (
        f"datasets/{TRAIN % 0}",
        content[TRAIN % 0],
        [],
        downloader.Meter.add,
    )
    monkeypatch.setattr(
        downloader.Meter, "add", lambda meter, count: add(meter, count) or received.append(count)
    )
    hub.repositories[REPO].announced[path] = truth
    hub.repositories[REPO].files[path] = truth + bytes(2_000_000)
    assert_refused(run(1), TRAIN % 0, "damaged", "instead of 2,024")
    assert len(truth) < sum(received) < 500_000
    assert not list((tmp_path / "out" / "datasets" / NAME).glob("*train*"))


@pytest.mark.parametrize(
    ("broken", "flaw"),
    [
        ({"magic": 7}, "magic is 7"),
        ({"version": 2}, "shard version 2"),
        ({"count": 501}, "501 tokens do not make"),
    ],
)
def test_a_shard_with_a_wrong_header_is_refused(broken, flaw, run, hub, tmp_path):
    hub.repositories[REPO].files[f"datasets/{VAL % 1}"] = shard_bytes(tmp_path, 1, **broken)
    assert_refused(run(1), VAL % 1, flaw)
    assert VAL % 1 not in files_below(tmp_path / "out")
    local = tmp_path / "out" / (VAL % 1)
    local.write_bytes(hub.repositories[REPO].files[f"datasets/{VAL % 1}"])
    assert_refused(run(1), VAL % 1, flaw)


def test_a_shard_that_the_repository_lacks_is_named_before_anything_is_fetched(run, hub, tmp_path):
    del hub.repositories[REPO].files[f"datasets/{TRAIN % 2}"]
    assert_refused(run(3), f"{REPO} lacks datasets/{TRAIN % 2}")
    assert files_below(tmp_path / "out") == {}
    ok(run(2))


def test_a_shard_that_is_listed_but_gone_is_one_line(run, hub, tmp_path):
    hub.errors[f"datasets/{TRAIN % 0}"], hub.error_code = [404], "EntryNotFound"
    assert_refused(run(1), TRAIN % 0, "HTTP 404")
    ok(run(1))


def test_a_full_disk_is_refused_before_the_first_shard(run, hub, content, tmp_path, monkeypatch):
    hub.repositories[REPO].sizes[f"datasets/{TRAIN % 0}"] = 5_000_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4_990_000_000))
    assert_refused(run(1), "needs 5.00 GB", "4.99 GB are free")
    assert [path for path, _ in hub.downloads] == ["datasets/manifest.json"]
    assert not list((tmp_path / "out").rglob("*.bin"))
    hub.repositories[REPO].sizes.clear()
    needed = sum(
        len(data) for path, data in expected(content, 1).items() if path != "manifest.json"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    assert_refused(run(1), "GB are free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    ok(run(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    ok(run(1))


def test_what_a_partial_file_holds_need_not_be_free(run, hub, content, tmp_path, monkeypatch):
    ok(run(0))
    hub.cut[f"datasets/{TRAIN % 0}"] = 600
    assert_refused(run(1), "connection failed")
    hub.cut.clear()
    rest = len(content[TRAIN % 0]) - 1800
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=rest - 1))
    assert_refused(run(1), "GB are free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=rest))
    ok(run(1))


def test_what_is_replaced_counts_as_free(run, hub, tmp_path, monkeypatch):
    ok(run(1))
    hub.repositories[REPO].files[f"datasets/{TRAIN % 0}"] = shard_bytes(tmp_path, 70)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    ok(run(1))
    hub.repositories[REPO].files[f"datasets/{TRAIN % 0}"] = shard_bytes(tmp_path, 71, tokens=501)
    assert_refused(run(1), "GB are free")


def test_skip_manifest_uses_the_local_one(run, hub, content, tmp_path):
    assert_refused(run(1, "--skip-manifest"), "manifest.json", "--skip-manifest")
    ok(run(1))
    local = tmp_path / "out" / "manifest.json"
    local.write_bytes(manifest_bytes(files_train=2, note="mine"))
    assert_refused(run(3, "--skip-manifest"), "it has 2")
    del hub.repositories[REPO].files["datasets/manifest.json"]
    ok(run(2, "--skip-manifest"))
    assert local.read_bytes() == manifest_bytes(files_train=2, note="mine")
    hub.repositories[REPO] = repository(content)
    ok(run(3))
    assert files_below(tmp_path / "out") == expected(content, 3)


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b'{"datasets": [{}]}', b'{"datasets": 1}', b"\xff", b"[" * 99_999]
)
def test_a_manifest_that_is_none_is_one_line_and_the_old_one_stays(
    data, run, hub, content, tmp_path
):
    ok(run(1))
    hub.repositories[REPO].files["datasets/manifest.json"] = data
    assert_refused(run(1), f"{REPO} datasets/manifest.json: not a manifest")
    assert files_below(tmp_path / "out") == expected(content, 1)


@pytest.mark.parametrize("key", ["stats", "tokenizer_name"])
def test_an_incomplete_manifest_entry_is_one_line(key, run, hub):
    manifest = json.loads(manifest_bytes())
    del manifest["datasets"][0][key]
    hub.repositories[REPO].files["datasets/manifest.json"] = json.dumps(manifest).encode()
    assert_refused(run(1), "incomplete manifest entry", key)


@pytest.mark.parametrize(
    "path", ["../../x", "tokenizers/../../x", "/etc/x", "tokenizers/.x", "datasets/x", "x", 7]
)
def test_a_manifest_cannot_place_files_elsewhere(path, run, hub, content, tmp_path):
    extra = {"manifest.json": manifest_bytes(model_path=path), str(path): b"evil"}
    hub.repositories[REPO] = repository(content | extra)
    assert_refused(run(1), repr(path), "not below tokenizers/")
    assert not (tmp_path / "x").exists()
    assert files_below(tmp_path / "out") == {}


def test_a_vocabulary_may_be_missing_and_a_model_may_not(run, hub, content, tmp_path):
    del hub.repositories[REPO].files[f"datasets/tokenizers/{MODEL}.vocab"]
    ok(run(1))
    assert f"tokenizers/{MODEL}.model" in files_below(tmp_path / "out")
    del hub.repositories[REPO].files[f"datasets/tokenizers/{MODEL}.model"]
    assert_refused(run(1), f"lacks datasets/tokenizers/{MODEL}.model")
    twice = manifest_bytes(model_path="tokenizers/m", path="tokenizers/m")
    hub.repositories[REPO].files["datasets/manifest.json"] = twice
    hub.repositories[REPO].files["datasets/tokenizers/m"] = b"m"
    assert "fetched 1 of 4 files" in ok(run(1)).out
    hub.repositories[REPO].files["datasets/manifest.json"] = manifest_bytes(model_path="")
    assert_refused(run(1), "names no file of the tokenizer")


def test_two_files_are_fetched_at_the_same_time(run, hub, content, tmp_path):
    hub.meet = threading.Barrier(2)
    ok(run(0))
    assert sorted(hub.met) == [f"datasets/{VAL % i}" for i in range(2)]
    assert files_below(tmp_path / "out") == expected(content, 0)


def test_the_first_failure_ends_the_other_downloads(run, hub, monkeypatch):
    monkeypatch.setattr(downloader, "THREADS", 1)
    hub.errors[f"datasets/tokenizers/{MODEL}.model"] = [403]
    assert_refused(run(5), MODEL, "HTTP 403")
    assert len(hub.downloads) < 5
    meter = downloader.Meter(100)
    meter.add(1)
    meter.stop()
    with pytest.raises(downloader.Refusal):
        meter.add(1)


def test_a_private_repository_needs_the_token_which_goes_to_the_hub_alone(
    run, hub, content, tmp_path
):
    hub.token = "hf_secret"
    assert_refused(run(1), REPO, "HTTP 401", "HF_TOKEN")
    assert_refused(run(1, HF_TOKEN="hf_wrong"), "HTTP 401")
    ok(run(1, HF_TOKEN="hf_secret"))
    assert files_below(tmp_path / "out") == expected(content, 1)
    assert hub.tokens_elsewhere == [None] * 3


@pytest.mark.parametrize("status", [403, 404])
def test_no_access_is_one_line_and_not_tried_again(status, run, hub):
    hub.errors["revision"] = [status]
    assert_refused(run(1), REPO, f"HTTP {status}", "MATCHED_FINEWEB_REPO_ID", "HF_TOKEN")
    assert hub.errors["revision"] == []
    ok(run(1))


def test_a_repository_that_does_not_exist_or_cannot_is_one_line(run):
    assert_refused(
        run(1, MATCHED_FINEWEB_REPO_ID="no/body"),
        "no/body",
        "HTTP 404",
        "no such dataset repository",
    )
    for name in ("nobody", "a/b/c", "", "a b/c"):
        assert_refused(
            run(1, MATCHED_FINEWEB_REPO_ID=name),
            f"MATCHED_FINEWEB_REPO_ID={name}: expected owner/name",
        )


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("where", ["revision", f"datasets/{TRAIN % 0}"])
def test_a_busy_hub_is_asked_again_and_then_given_up(status, where, run, hub, content, tmp_path):
    hub.errors[where] = [status] * 3
    assert_refused(run(1), f"HTTP {status}", "wait some minutes" if status == 429 else "later")
    assert hub.errors[where] == []
    hub.errors[where] = [status] * 2
    assert ok(run(1)).out.count("trying again") == 2
    assert files_below(tmp_path / "out") == expected(content, 1)


def test_waits_grow_between_attempts(hub, monkeypatch):
    waits, failure = [], downloader.huggingface_hub.errors.HTTPError("down")

    def fail():
        raise failure

    with pytest.raises(type(failure)):
        downloader.with_retries(fail, waits.append)
    assert waits == [1, 2, 4, 8, 16]


def test_no_network_and_something_that_is_no_hub_are_one_line(run, hub, monkeypatch):
    assert_refused(run(1, HF_ENDPOINT="http://127.0.0.1:9"), REPO, "connection failed")
    monkeypatch.setattr(
        Handler, "answer", lambda self, *a, **k: type(self).__base__.send_error(self, 200)
    )
    assert_refused(run(1), REPO, "HF_ENDPOINT")


def test_an_interruption_is_one_line_and_keeps_what_arrived(
    run, hub, content, tmp_path, monkeypatch
):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            downloader.Ledger,
            "add",
            lambda self, files, source: interrupted() if list(files) else None,
        )
        assert_refused(run(1), "interrupted", "goes on")
    hub.downloads.clear()
    assert len(files_below(tmp_path / "out")) >= 1
    ok(run(1))
    assert len(hub.downloads) < 6
    assert files_below(tmp_path / "out") == expected(content, 1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_redraws_itself(hub, run, tmp_path, monkeypatch):
    terminal = Terminal()
    meter = downloader.Meter(1000)
    assert not meter.progress.enabled
    monkeypatch.setattr(sys, "stderr", terminal)
    meter = downloader.Meter(1000)
    meter.progress.shown = -1e9
    meter.add(400)
    meter.add(600)
    lines = terminal.getvalue().split("\r")
    assert [re.search(r" \d+%| ETA \d+s", line) is not None for line in lines] == [
        False,
        True,
        True,
    ]
    assert "downloading  40% ETA 0s 0.00 of 0.00 GB" in lines[1]
    assert terminal.getvalue().count("\n") == 1


def test_without_the_library_help_works_and_anything_else_is_one_line(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        script = runpy.run_path(downloader.__file__)
    result = run_in_process(script["main"], {}, tmp_path, "--help")
    assert (result.code, result.err) == (0, "")
    assert "python data/cached_challenge_fineweb.py 1 " in result.out
    assert "MATCHED_FINEWEB_REPO_ID=kevclark/parameter-golf python" in result.out
    assert_refused(run_in_process(script["main"], {}, tmp_path, "1"), "pip install huggingface_hub")
    assert list(tmp_path.iterdir()) == []


def test_the_script_runs_from_any_directory_in_its_own_process(hub, content, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    env = {
        "HF_ENDPOINT": hub.url,
        "MATCHED_FINEWEB_REPO_ID": REPO,
        "HF_HOME": str(tmp_path / "home"),
    }
    argv = (1, "--variant", "sp1024", "--output", "out")
    result = run_command("data/cached_challenge_fineweb.py", env, tmp_path / "elsewhere", *argv)
    assert (result.code, result.err) == (0, "")
    assert files_below(tmp_path / "elsewhere" / "out") == expected(content, 1)
    assert os.listdir(tmp_path / "elsewhere") == ["out"]
    assert not any((tmp_path / "home").rglob("*.bin"))


def test_the_default_folder_is_the_script_s_own(monkeypatch):
    seen = []
    monkeypatch.setattr(downloader, "Hub", lambda *args: args)
    monkeypatch.setattr(downloader, "download", lambda args, hub: seen.append((args.output, hub)))
    monkeypatch.setattr(os, "environ", {})
    downloader.main([])
    assert seen == [(ROOT / "data", ("willdepueoai/parameter-golf", "datasets", None))]

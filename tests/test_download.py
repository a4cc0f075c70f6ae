"""data/cached_challenge_fineweb.py against a local hub.   pytest tests/test_download.py"""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.dummy import DummyProcess
from pathlib import Path
from urllib.parse import unquote, urlsplit

import cached_challenge_fineweb as downloader
import huggingface_hub
import pytest
from helpers_cli import Result, assert_refused, run_in_process
from huggingface_hub import constants

REPO, OTHER = "owner/golf", "mirror/golf"
NAME, MODEL = "fineweb10B_sp1024", "fineweb_1024_bpe"
VAL, TRAIN = (f"datasets/{NAME}/fineweb_{split}_%06d.bin" for split in ("val", "train"))


class Hub(ThreadingHTTPServer):
    """A hub on 127.0.0.1; large files are redirected to another host name, as on the real one."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}  # content by path
        self.damaged: dict[str, bytes] = {}  # what is sent instead of the content
        self.cut: dict[str, int] = {}  # path -> bytes after which the connection breaks
        self.status = 200  # of the listing
        self.token = None
        self.downloads: list[tuple[str, int]] = []  # path and first byte of what was sent
        self.tokens_elsewhere: list[str | None] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    """GET of the listing and of the files."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in several packets waits 40 ms for an acknowledgement of the first

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes = b"", cut: int | None = None, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = cut is not None

    def do_GET(self):
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        kinds = r"/(api/datasets|datasets|storage)/(\w+/\w+)/(?:revision|resolve)/\w+/?(.*)"
        parts = re.fullmatch(kinds, path)
        if parts is None:  # the library asks for more than the downloader does
            return self.answer(404)
        place, repo_id, name = parts.groups()
        if place == "storage":
            hub.tokens_elsewhere.append(self.headers["Authorization"])
        elif hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self.answer(401, X_Error_Code="RepoNotFound")
        if repo_id not in hub.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound")
        files = hub.repositories[repo_id]
        if place == "api/datasets":
            siblings = [sibling(path, data) for path, data in files.items()]
            listing = {"id": repo_id, "sha": "c" * 40, "siblings": siblings}
            return self.answer(hub.status, json.dumps(listing).encode())
        if place == "datasets" and name.endswith(".bin"):
            elsewhere = f"http://localhost:{hub.server_port}/storage"
            return self.answer(302, Location=elsewhere + path.removeprefix("/datasets"))

        data = hub.damaged.get(name, files[name])
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        hub.downloads.append((name, start))
        place = f"bytes {start}-{len(data) - 1}/{len(data)}"
        status = 206 if start else 200
        return self.answer(status, data[start:], hub.cut.get(name), Content_Range=place)


def sibling(path: str, data: bytes) -> dict:
    """Return what the listing says of a file, of which shards are in LFS."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    about = {"rfilename": path, "size": len(data), "blobId": git}
    if path.endswith(".bin"):
        digest = hashlib.sha256(data).hexdigest()
        about["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
    return about


@pytest.fixture
def content() -> dict[str, bytes]:
    """2,000 bytes for each of what a data set consists of, by path below the prefix."""
    paths = [*(VAL % i for i in range(2)), *(TRAIN % i for i in range(5)), "manifest.json"]
    paths += [f"tokenizers/{MODEL}.model", f"tokenizers/{MODEL}.vocab", "docs_selected.jsonl"]
    return {path: path.encode().ljust(2000) for path in [*paths, "tokenizers/unwanted.model"]}


def repository(content: dict[str, bytes], prefix: str = "datasets/") -> dict[str, bytes]:
    return {prefix + path: data for path, data in content.items()} | {"README.md": b"hello"}


@pytest.fixture
def hub(content):
    server = Hub()
    server.repositories[REPO] = repository(content)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub, tmp_path, monkeypatch):
    """Function that runs the command line against `hub` in this process."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between retries of the library

    def run(*argv: object, **env: str) -> Result:
        env = {"MATCHED_FINEWEB_REPO_ID": REPO} | env
        # Which the library reads when it is imported.
        endpoint = env.get("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        huggingface_hub.close_session()  # which keeps the proxy of an earlier run
        argv = (*argv, "--output", tmp_path / "out")
        result = run_in_process(downloader.main, env, tmp_path, *argv)
        # Threads that a failure leaves would end with its process; here the next run meets them.
        for thread in threading.enumerate():
            if isinstance(thread, DummyProcess):
                thread.join()
        return result

    return run


def files_below(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def expected(content: dict[str, bytes], train_shards: int, *extra: str) -> dict[str, bytes]:
    paths = ["manifest.json", f"tokenizers/{MODEL}.model", f"tokenizers/{MODEL}.vocab", *extra]
    paths += [VAL % 0, VAL % 1, *(TRAIN % i for i in range(train_shards))]
    return {path: content[path] for path in paths}


def ok(result: Result) -> str:
    assert (result.code, result.err) == (0, "")
    return result.out


def test_the_layout_is_the_challenge_s_and_only_what_is_missing_is_fetched(
    run, hub, content, tmp_path
):
    assert_refused(run(), "80 training shards", "it has 5")
    assert_refused(run("--train-shards", -1), "-1 training shards")
    assert files_below(tmp_path / "out") == {}
    assert "fetched 7 of 7 files" in ok(run(3, "--train-shards", 1))
    assert files_below(tmp_path / "out") == expected(content, 3)
    hub.downloads.clear()
    ok(run("--train-shards", 4))
    fetched = sorted(hub.downloads)
    assert fetched == [(f"datasets/{TRAIN % 3}", 0), ("datasets/manifest.json", 0)]
    (tmp_path / "out" / "manifest.json").write_bytes(b"mine")
    assert "fetched 1 of 5 files" in ok(run(0, "--skip-manifest", "--with-docs"))
    content["manifest.json"] = b"mine"
    assert files_below(tmp_path / "out") == expected(content, 4, "docs_selected.jsonl")
    del hub.repositories[REPO]["datasets/docs_selected.jsonl"]
    assert_refused(run(0, "--with-docs"), "no datasets/docs_selected.jsonl")


def test_byte_sidecars_come_along_and_no_shard_without_one(run, hub, content, tmp_path):
    sidecars = [path.replace("_val_", "_val_bytes_") for path in (VAL % 0, VAL % 1)]
    content |= {path: path.encode() for path in sidecars}
    hub.repositories[REPO] = repository(content)
    ok(run(0))
    assert files_below(tmp_path / "out") == expected(content, 0, *sidecars)
    del hub.repositories[REPO][f"datasets/{sidecars[1]}"]
    assert_refused(run(0), f"{REPO}: no fineweb_val_bytes sidecar of {VAL % 1}")
    # A variant that is transformed by its name lacks all of them.
    name = "sp1024_lossless_caps_caseops_v1"
    named = {path.replace(NAME, f"fineweb10B_{name}"): data for path, data in content.items()}
    hub.repositories[REPO] = repository({p: named[p] for p in named if "_val_bytes_" not in p})
    assert_refused(run(0, "--variant", name), "no fineweb_val_bytes sidecar of")


def test_prefix_and_variant_name_what_is_fetched(run, hub, content, tmp_path):
    name, tokenizer = "fineweb10B_byte260", "tokenizers/sub/pure_byte_260.json"
    files = {path.replace(NAME, name): data for path, data in content.items()}
    hub.repositories[OTHER] = repository(files | {tokenizer: b"{}"}, prefix="")
    options = ("--variant", "byte260", 1)
    mirror = {"MATCHED_FINEWEB_REPO_ID": OTHER, "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": ""}
    assert "50,000" in ok(run(*options, **mirror))
    fetched = files_below(tmp_path / "out")
    assert f"datasets/{name}/fineweb_train_000000.bin" in fetched
    assert [path for path in fetched if path.startswith("tokenizers")] == [tokenizer]
    assert_refused(run("--variant", "sp1024", **mirror), f"has no {NAME} in /", f"only {name};")
    mirror["MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"] = "wrong"
    assert_refused(run(*options, **mirror), "in wrong/ (MATCHED_FINEWEB_REMOTE_ROOT_PREFIX)")
    assert_refused(run("--variant", "../sp1024"), "--variant ../sp1024: ")
    assert_refused(run(MATCHED_FINEWEB_REPO_ID="nobody"), "not of the form owner/name")
    hub.repositories[REPO] = repository({p: content[p] for p in content if MODEL not in p})
    assert_refused(run(1), "no tokenizer of 1024 pieces")


@pytest.mark.parametrize("path", [TRAIN % 0, TRAIN % 7, f"tokenizers/{MODEL}.model"])
def test_what_differs_from_the_repository_is_neither_replaced_nor_mixed(
    path, run, hub, content, tmp_path
):
    ok(run(0))
    hub.downloads.clear()
    local = tmp_path / "out" / path
    for data in (b"another".ljust(2000), content[TRAIN % 0][:-3]):
        local.write_bytes(data)
        assert_refused(run(1), f"{local} is not what {REPO} has now: ", "delete or move")
        assert local.read_bytes() == data
    assert hub.downloads == []
    local.unlink()
    ok(run(1))
    hub.repositories[OTHER] = repository(content | {TRAIN % 0: b"another"})
    assert_refused(run(2, MATCHED_FINEWEB_REPO_ID=OTHER), TRAIN % 0, OTHER)
    assert files_below(tmp_path / "out") == expected(content, 1)


def test_a_broken_connection_is_retried_and_resumed_by_the_next_run(run, hub, content, tmp_path):
    path = f"datasets/{TRAIN % 0}"
    hub.cut[path] = 600
    ok(run(1))
    starts = [start for name, start in hub.downloads if name == path]
    assert starts == [0, 600, 1200, 1800], "the library goes on where the connection broke"
    (tmp_path / "out" / (TRAIN % 0)).unlink()
    hub.cut[path] = 0
    assert_refused(run(1), TRAIN % 0, "connection failed", "goes on")
    assert TRAIN % 0 not in files_below(tmp_path / "out")
    (partial,) = (tmp_path / "out").rglob("*.partial")
    partial.write_bytes(content[TRAIN % 0][:700])
    hub.cut.clear()
    ok(run(1))
    assert hub.downloads[-2] == (path, 700)
    assert files_below(tmp_path / "out") == expected(content, 1)


def test_a_file_that_is_not_as_stated_never_gets_a_final_name(run, hub, content, tmp_path):
    path, truth = f"datasets/{TRAIN % 0}", content[TRAIN % 0]
    for sent, flaw in ((truth[:1900], "1,900 bytes instead of 2,000"), (truth[::-1], "checksum")):
        hub.damaged[path] = sent
        assert_refused(run(1), TRAIN % 0, "damaged", flaw)
        assert not list((tmp_path / "out" / "datasets" / NAME).glob("*train*"))
    hub.damaged.clear()
    ok(run(1))
    assert files_below(tmp_path / "out") == expected(content, 1)


def test_no_access_no_network_and_no_hub_are_one_line(run, hub, monkeypatch):
    """The token goes to the hub alone, and a refused one is blamed."""
    assert_refused(run(1, MATCHED_FINEWEB_REPO_ID="no/body"), "no/body", "no such dataset")
    hub.token = "hf_secret"
    assert_refused(run(1), REPO, "HTTP 401", "no such dataset repository or file, or it needs")
    refused = run(1, HF_TOKEN="hf_expired")
    assert_refused(refused, "HTTP 401", "refuses the token of HF_TOKEN", "public data needs none")
    ok(run(1, HF_TOKEN="hf_secret"))
    assert hub.tokens_elsewhere == [None] * 3
    for status in (403, 500):
        hub.status = status
        assert_refused(run(1, HF_TOKEN="hf_secret"), REPO, f"HTTP {status}")
    assert_refused(run(1, HF_ENDPOINT="http://127.0.0.1:9"), REPO, "connection failed")
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.answer(200, b"<html>"))
    assert_refused(run(1), REPO, "connection failed")


def test_no_secret_is_in_any_message(run, hub):
    hub.token = "another"
    for planted in (
        {"HF_TOKEN": "hf_PLANTED"},
        {"HF_TOKEN": "hf_PLANTED\u00e9"},  # no header
        {"HF_ENDPOINT": "https://me:PLANTED@127.0.0.1:9"},
        {"MATCHED_FINEWEB_REPO_ID": "https://me:PLANTED@huggingface.co/datasets/a/b"},
        {"HTTP_PROXY": "http://me:PLANTED@127.0.0.1:9"},
        {"HTTP_PROXY": "gopher://me:PLANTED@127.0.0.1:9"},
    ):
        result = run(1, **planted)
        assert_refused(result)
        assert "PLANTED" not in result.err + result.out

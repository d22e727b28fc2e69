"""`foem push` against a small hub on this machine: real requests, real uploads, real refusals."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse

import pytest
from checkpoints import write_rtn_checkpoint

from foem_vllm import hub
from foem_vllm.errors import FoemError
from foem_vllm.format import QuantSpec


class Hub(http.server.BaseHTTPRequestHandler):
    """What of the hub's API an upload needs. Tokens: writer may write, reader may not, others are unknown."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        state, path = self.server, urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        allowed = {"Bearer writer": 200, "Bearer reader": 403}.get(self.headers.get("authorization"), 401)
        if allowed != 200:
            return self.answer({"error": "refused\nin two lines"}, allowed)
        if path == "/api/repos/create":
            state.created.append(json.loads(body))
            return self.answer({"url": f"{state.address}/me/model"})
        if path.startswith("/api/models/me/model/branch/"):
            return self.answer({})
        if "/preupload/" in path:
            modes = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in json.loads(body)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        if path.endswith("/info/lfs/objects/batch"):
            upload = {"upload": {"href": f"{state.address}/object"}}
            return self.answer({"transfer": "basic", "objects": [{**o, "actions": upload} for o in json.loads(body)["objects"]]})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    state.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    state.files[value["path"]] = state.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del state.files[value["path"]]
            state.branches.append(path.rpartition("/")[2])
            return self.answer({"commitUrl": f"{state.address}/me/model/commit/0", "commitOid": "0" * 40, "pullRequestUrl": None})
        self.answer({"error": f"unknown {path}"}, 404)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self.answer({})

    def do_GET(self):
        if not re.match(r"/api/models/me/model/tree/", self.path):
            return self.answer({"error": f"unknown {self.path}"}, 404)
        self.answer([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in self.server.files.items()])

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    found.address = f"http://127.0.0.1:{found.server_port}"
    found.files, found.objects, found.created, found.branches = {}, {}, [], []
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture(scope="module")
def checkpoint(untrained, tmp_path_factory):
    folder = write_rtn_checkpoint(untrained, tmp_path_factory.mktemp("push") / "out", QuantSpec(4, 32), foem=True)
    shutil.rmtree(folder / "dense")
    return folder


def run(folder, *arguments, **environment):
    known = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "foem_vllm.cli", "push", str(folder), *arguments],
        env={**known, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_what_arrives_is_the_checkpoint_and_nothing_else(server, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "out")
    (folder / ".out.partial-1").mkdir()
    (folder / ".out.partial-1/model.safetensors").write_bytes(b"half")
    (folder / ".cache").write_text("not to be seen")
    server.files |= {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"old", ".gitattributes": b"x"}
    done = run(folder, "me/model", "--private", "--revision", "w4", HF_ENDPOINT=server.address, HF_TOKEN="writer")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{server.address}/me/model"
    assert server.created[0]["visibility"] == "private" and set(server.branches) == {"w4"}
    expected = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    assert server.files == {**expected, ".gitattributes": b"x"}, "old weights are gone, nothing hidden was sent"


@pytest.fixture
def library(monkeypatch):
    """What huggingface_hub read from the environment when it was imported, to be set per test."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def set(endpoint, token):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setenv("HF_TOKEN", token)

    return set


@pytest.mark.parametrize("token, remedy", [("reader", "HTTP 403.*may not write"), ("wrong", "HTTP 401.*hf auth login")])
def test_refusals_say_what_to_do(server, checkpoint, library, token, remedy):
    library(server.address, token)
    with pytest.raises(FoemError, match=remedy) as error:
        hub.push(checkpoint, "me/model")
    assert "\n" not in str(error.value) and server.files == {}


def test_without_a_network_one_line_says_so(server, checkpoint, library):
    server.shutdown()
    server.server_close()
    library(server.address, "writer")
    with pytest.raises(FoemError, match="cannot be reached.*HF_ENDPOINT") as error:
        hub.push(checkpoint, "me/model")
    assert "\n" not in str(error.value)
    done = run(checkpoint, "me/model", HF_HUB_OFFLINE="1", HF_TOKEN="writer")
    assert done.returncode == 1 and re.fullmatch(r"foem: error: .* cannot be reached .*offline.*\n", done.stderr)


def test_a_name_that_is_none(checkpoint):
    with pytest.raises(FoemError, match="OWNER/NAME"):
        hub.push(checkpoint, "me/my/model")


def damage(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def forget(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["meta"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, name, expected",
    [
        (damage, "out", "sha256.*damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "out", "model.safetensors is missing"),
        (lambda f: (f / "config.json").unlink(), "out", "config.json"),
        (lambda f: shutil.copy(f / "model.safetensors", f / "other.safetensors"), "out", "other.safetensors is not among"),
        (forget, "out", "no checksum"),
        (lambda f: None, ".out.partial-abc", "unfinished"),
        (shutil.rmtree, "out", "no such folder"),
    ],
)
def test_what_is_not_whole_stays_here(checkpoint, tmp_path, change, name, expected):
    folder = shutil.copytree(checkpoint, tmp_path / name)
    change(folder)
    with pytest.raises(FoemError, match=expected):
        hub.files_of(folder)

"""`mmv upload`, by the real client, to a hub on loopback that speaks its protocol of commits."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minimind_v.core.export.folder import export
from tests.cli.harness import run_mmv, tree
from tests.export.made import order

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Repositories by name: what they hold and whether they are private."""

    def __init__(self):
        self.repos, self.private, self.large, self.tokens = {}, {}, {}, set()
        self.refuse = 0

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, content=None):
            data = json.dumps(content if content is not None else {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self):
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self):
            repo = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*)?", self.path.split("?")[0])
            if repo and repo[1] in hub.repos:
                info = {"id": repo[1], "sha": COMMIT, "private": hub.private[repo[1]], "siblings": []}
                return self.answer(200, info)
            return self.answer(404)

        def do_PUT(self):
            hub.large[self.path.removeprefix("/store/")] = self.body()
            self.answer(200)

        def do_POST(self):
            body = self.body()
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.refuse:
                return self.answer(hub.refuse, {"error": "You have no rights here"})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                exists = name in hub.repos
                hub.repos.setdefault(name, {})
                hub.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
                return self.answer(409 if exists else 200, {"url": f"{hub.endpoint}/{name}"})
            if self.path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if re.search(r"/preupload/main", self.path):
                files = [
                    {"path": file["path"], "shouldIgnore": False, "oid": None,
                     "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                    for file in json.loads(body)["files"]
                ]  # fmt: skip
                return self.answer(200, {"files": files})
            if self.path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    file | {"actions": {"upload": {"href": f"{hub.endpoint}/store/{file['oid']}"}}}
                    for file in json.loads(body)["objects"]
                ]
                return self.answer(200, {"transfer": "basic", "objects": objects})
            if match := re.match(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
                for line in body.decode().splitlines():
                    operation = json.loads(line)
                    if operation["key"] == "file":
                        hub.repos[match[1]][operation["value"]["path"]] = base64.b64decode(
                            operation["value"]["content"]
                        )
                    if operation["key"] == "lfsFile":
                        hub.repos[match[1]][operation["value"]["path"]] = hub.large[operation["value"]["oid"]]
                return self.answer(
                    200, {"commitUrl": f"{hub.endpoint}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT}
                )
            return self.answer(404)

    return Handler


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Hub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    export(order(), "hf", tmp_path / "model", check=False)
    return tmp_path / "model"


def test_every_file_arrives_and_nothing_else(hub, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")  # a card may be edited
    report = run_mmv("upload", folder, "--repo", "me/model", "--endpoint", hub.endpoint, "--json").json
    names = set(tree(folder)) - {"notes.txt"}
    assert set(hub.repos["me/model"]) == names
    assert all(hub.repos["me/model"][name] == (folder / name).read_bytes() for name in names)
    weights = (folder / "model.safetensors").read_bytes()
    assert list(hub.large) == [hashlib.sha256(weights).hexdigest()]
    assert report == {
        "repo": "me/model", "url": f"{hub.endpoint}/me/model", "commit": COMMIT, "files": len(names),
        "bytes": sum((folder / name).stat().st_size for name in names),
    }  # fmt: skip
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.private["me/model"] is False
    assert run_mmv("upload", folder, "--repo", "me/model", "--endpoint", hub.endpoint).code == 0  # a second time too


def test_private(hub, folder):
    args = ("upload", folder, "--endpoint", hub.endpoint, "--private", "--repo")
    assert run_mmv(*args, "me/secret").code == 0
    assert hub.private["me/secret"] is True
    hub.repos["me/open"], hub.private["me/open"] = {}, False
    assert "me/open exists and is public" in run_mmv(*args, "me/open").error
    assert hub.repos["me/open"] == {}


def test_without_a_token_it_says_how_to_get_one(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    ended = run_mmv("upload", folder, "--repo", "me/model", "--endpoint", hub.endpoint)
    assert ended.code == 1
    assert f"no token for {hub.endpoint} — run `hf auth login` (or set HF_TOKEN)" in ended.error
    assert hub.tokens == set()


@pytest.mark.parametrize("status", [401, 403, 400])
def test_a_hub_that_refuses_is_one_line(hub, folder, status):
    hub.refuse = status
    ended = run_mmv("upload", folder, "--repo", "me/model", "--endpoint", hub.endpoint)
    assert ended.code == 1
    assert f"refuses me/model ({status}: " in ended.error
    assert hub.repos == {}


def test_a_hub_that_is_not_there(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ended = run_mmv("upload", folder, "--repo", "me/model", "--endpoint", "http://127.0.0.1:9")
    assert ended.code == 1
    assert "http://127.0.0.1:9 cannot be reached" in ended.error


@pytest.mark.parametrize("repo", ["model", "a/b/c", "me/mo del", "", "https://hub/me/model"])
def test_names_that_are_none(hub, folder, repo):
    ended = run_mmv("upload", folder, "--repo", repo, "--endpoint", hub.endpoint)
    assert ended.code == 2
    assert "--repo" in ended.error


def test_only_what_was_exported_and_is_whole(hub, folder, tmp_path):
    args = ("--repo", "me/model", "--endpoint", hub.endpoint)
    ended = run_mmv("upload", tmp_path, *args)
    assert (ended.code, "not written by `mmv convert`" in ended.error) == (2, True)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    assert "was changed after the export" in run_mmv("upload", folder, *args).error
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in run_mmv("upload", folder, *args).error
    assert hub.repos == {}

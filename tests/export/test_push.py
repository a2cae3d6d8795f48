"""`minitron push`, over HTTP to a hub of this file's own, which speaks the real client's protocol."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pico import pico_llama
from words import save_tokenizer

from nemo_minitron.errors import InputError
from nemo_minitron.export.push import card_for, check_push

REPO, TOKEN = "me/small", "hf_secret"
CARD = '# small\n\nAutoTokenizer.from_pretrained("small")\nAutoModelForCausalLM.from_pretrained("small", x=1)\n'


class Hub(BaseHTTPRequestHandler):
    """Makes a repository, says which files are large (safetensors), takes those by PUT and the commit by POST."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        hub.asked.append((self.path, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.say({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            hub.made = json.loads(body)
            self.say({"url": f"{hub.address}/{REPO}", "name": REPO})
        elif self.path == "/api/validate-yaml":  # the front matter of the card
            self.say({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "lfs" if n.endswith("safetensors") else "regular"} for n in names]
            self.say({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.address}/put/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.say({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        elif "/commit/" in self.path:
            hub.commit = [json.loads(line) for line in body.splitlines()]
            address = f"{hub.address}/{REPO}/commit/abc"
            self.say({"commitUrl": address, "commitOid": "abc", "pullRequestUrl": None, "success": True})
        else:
            self.say({"error": f"no such place {self.path}"}, 404)

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.say({})

    def do_GET(self):
        self.say({"error": f"no such place {self.path}"}, 404)

    def say(self, values, code=200, kind="application/json"):
        text = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.large, server.commit, server.made = [], {}, [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def student(tmp_path):
    folder = tmp_path / "student"
    pico_llama(folder, num_hidden_layers=2)
    save_tokenizer(folder, ["the model reads words"], 509)
    (folder / "README.md").write_text(CARD)
    (folder / "figures").mkdir()
    (folder / "figures" / "perplexity.png").write_bytes(b"\x89PNG")
    (folder / "minitron_training.json").write_text('"a digest"')
    (folder / ".lock").write_text("1")
    return folder


def push(hub, student, *options, token=TOKEN):
    # hf-xet would send large files to storage of its own, by a protocol that only its servers speak
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "nemo_minitron.cli", "push", str(student), REPO, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_student_with_its_card_and_figures(hub, student):
    done = push(hub, student)
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/{REPO}/commit/abc" in done.stdout
    assert hub.made["private"] is True
    files = {row["value"]["path"]: row["value"] for row in hub.commit if row["key"] == "file"}
    large = {row["value"]["path"]: row["value"]["oid"] for row in hub.commit if row["key"] == "lfsFile"}
    wanted = {str(file.relative_to(student)) for file in student.rglob("*") if file.is_file()}
    assert files.keys() | large.keys() == wanted - {".lock", "minitron_training.json"}
    assert large == {"model.safetensors": hashlib.sha256((student / "model.safetensors").read_bytes()).hexdigest()}
    assert hub.large[large["model.safetensors"]] == (student / "model.safetensors").read_bytes()
    for name in ("config.json", "tokenizer.json", "figures/perplexity.png"):
        assert base64.b64decode(files[name]["content"]) == (student / name).read_bytes()
    card = base64.b64decode(files["README.md"]["content"]).decode()
    assert card == CARD.replace('"small"', f'"{REPO}"')


def test_what_the_hub_refuses_is_told_and_fails(hub, student):
    done = push(hub, student, token="hf_wrong")
    assert done.returncode == 1, done.stderr
    assert f"minitron: the hub did not take '{REPO}': " in done.stderr
    assert "401" in done.stderr
    assert "Traceback" not in done.stderr
    assert not hub.commit


@pytest.mark.parametrize(
    ("change", "repo", "words"),
    [
        ("README.md", REPO, "has no model card README.md"),
        ("model.safetensors", REPO, "has no safetensors file"),
        ("", "small", "names no owner; write OWNER/NAME"),
        ("", "me/sm all", "is no name of a repository"),
        ("", REPO, "HF_HUB_OFFLINE switches the hub off"),
    ],
)
def test_refused_before_anything_is_sent(student, monkeypatch, change, repo, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if change:
        (student / change).unlink()
    with pytest.raises(InputError, match=words):
        check_push(student, repo)


def test_a_card_of_another_wording_stays():
    assert card_for("# a card\nfrom_pretrained(folder)", REPO) == "# a card\nfrom_pretrained(folder)"

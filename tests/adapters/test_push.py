"""Publishing, against a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from harness import CommandLine, dpo_lora


class Hub(ThreadingHTTPServer):
    """Keeps what was created and committed.

    ``refuse`` is the status it answers every request with, ``objection`` what it has against a card's head.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.refuse: int | None = None
        self.objection: str | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self._body()
        if self.server.refuse:
            return self._say(self.server.refuse, {"error": "You may not write here"})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._say(200, {"url": f"{self.server.address}/someone/adapter"})
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._say(200, {"files": modes})
        if self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            address = f"{self.server.address}/someone/adapter/commit/{'0' * 40}"
            return self._say(200, {"success": True, "commitOid": "0" * 40, "commitUrl": address})
        if self.server.objection:  # validation of the card's front matter
            return self._say(400, {"errors": [{"message": self.server.objection}], "warnings": []})
        return self._say(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._say(404, {"error": "not found"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, status: int, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pushed(run: Path, hub: Hub) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client takes its address from the environment when it is imported."""
    online = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    return dpo_lora("push", str(run), "someone/adapter", "--base", "their/base", **online)


def one_message(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_is_pushed_is_complete_private_and_tells_nothing_of_this_machine(
    finished: Path, tmp_path_factory: pytest.TempPathFactory, hub: Hub
) -> None:
    done = pushed(finished, hub)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("0" * 40)
    assert hub.created[0]["visibility"] == "private"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "eval.json"} <= set(
        hub.files
    )
    assert hub.files["adapter_model.safetensors"] == (finished / "adapter_model.safetensors").read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "their/base"
    matter = yaml.safe_load(hub.files["README.md"].decode().split("---\n")[1])
    assert matter["base_model"] == "their/base"
    assert matter["model_name"] == "adapter"
    assert b"model='someone/adapter'" in hub.files["README.md"]
    assert not any(b"hf_secret" in content for content in hub.files.values())
    folders = str(tmp_path_factory.getbasetemp()).encode()  # of the run, the base model and the pairs
    assert folders in (finished / "README.md").read_bytes()
    assert not [name for name, content in hub.files.items() if folders in content]
    assert b"data.path=pairs.jsonl" in hub.files["README.md"]


def test_a_refusal_of_the_hub_is_one_message(finished: Path, hub: Hub) -> None:
    hub.refuse = 403
    assert "someone/adapter was not written" in one_message(pushed(finished, hub))


def test_what_the_hub_has_against_a_card_is_one_message(finished: Path, hub: Hub) -> None:
    hub.objection = '"license" must be one of [apache-2.0, mit, other]'
    message = one_message(pushed(finished, hub))
    assert hub.objection in message
    assert str(finished / "run.json") in message
    assert not hub.files


def test_a_base_that_nobody_else_has_is_not_published(cli: CommandLine, finished: Path) -> None:
    outcome = cli("push", str(finished), "someone/adapter")
    assert outcome.code == 2
    assert "--base OWNER/NAME" in outcome.err


def test_a_hub_that_cannot_be_reached_is_one_message(finished: Path, hub: Hub) -> None:
    hub.server_close()  # nobody listens on its port any more
    assert "check the network" in one_message(pushed(finished, hub))


def test_without_a_network_nothing_is_lost(cli: CommandLine, finished: Path) -> None:
    outcome = cli("push", str(finished), "someone/adapter", "--base", "their/base")  # tests run with HF_HUB_OFFLINE=1
    assert outcome.code == 2
    assert "check the network" in outcome.err

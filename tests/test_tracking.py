"""Trackers: what cannot be opened is said before anything is loaded, and a run ends there as what it became."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dpo_lora import tracking
from dpo_lora.choices import TrackerKind, TrackerMode
from dpo_lora.errors import Interrupted, UserError
from dpo_lora.rundir import RunDir
from dpo_lora.schema import TrackingSettings
from evaluation.test_tracked import records
from harness import CommandLine

OFFLINE = TrackingSettings(
    kind=TrackerKind.wandb, project="p", entity=None, group=None, tags=[], mode=TrackerMode.offline, log_adapter=False
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create({}, outputs=tmp_path, name="", path=tmp_path / "a run: größer")


def written(run: RunDir, kind: str) -> Any:
    """The first record of this kind in W&B's own file, which its own process writes after the run was closed."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = run.path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for data in records(file.read_bytes()):
            record = Record()
            with contextlib.suppress(DecodeError):  # half of it is there
                record.ParseFromString(data)
            if record.WhichOneof("record_type") == kind:
                return getattr(record, kind)
        time.sleep(0.05)
    raise AssertionError(f"{file} has no record of {kind}")


ONLINE = """
from dpo_lora import tracking
from dpo_lora.choices import TrackerKind, TrackerMode
from dpo_lora.errors import UserError
from dpo_lora.schema import TrackingSettings

try:
    tracking.check(TrackingSettings(TrackerKind.wandb, "p", None, None, [], TrackerMode.online, False))
except UserError as error:
    print(error)
"""


def asked_online(folder: Path, **environment: str) -> str:
    """What is said of a run that is to be tracked online; in a process of its own: wandb remembers what it has read."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    mine = {"HOME": str(folder), "NETRC": str(folder / "netrc")}
    done = subprocess.run(
        [sys.executable, "-c", ONLINE], capture_output=True, text=True, check=True, env=known | mine | environment
    )
    return done.stdout


def test_online_without_a_key_is_refused_with_what_to_do(tmp_path: Path) -> None:
    said = asked_online(tmp_path)
    assert "no key of W&B is known here" in said
    assert "tracking.mode=offline" in said


def test_a_key_that_the_service_refuses_is_the_users_to_correct(tmp_path: Path) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{service.server_port}"
        said = asked_online(tmp_path, WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
        service.shutdown()
    assert f"Failed to authenticate with {address}" in said
    assert "the key ('wandb login')" in said


def test_tensorboard_that_is_missing_is_said_before_the_model_is_looked_for(
    cli: CommandLine, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = [w for w in tiny_overrides if not w.startswith(("tracking=", "model.name="))]
    outcome = cli("train", *words, "model.name=nobody/nothing", "tracking=tensorboard")
    assert outcome.code == 2, outcome.err
    assert "pip install 'dpo-lora[tensorboard]'" in outcome.err


@pytest.mark.parametrize("opened", [False, True])
def test_a_project_that_wandb_does_not_take_is_the_users_to_correct(run: RunDir, opened: bool) -> None:
    asked = replace(OFFLINE, project="mine/yours")
    with pytest.raises(UserError, match=r"tracking\.project=mine/yours.*cannot contain characters.*tracking=none"):
        if opened:
            with tracking.open_tracker(asked, run, None, {}):
                pass
        else:
            tracking.check(asked)


def test_what_the_service_refuses_is_the_users_to_correct(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**said: Any) -> None:
        raise wandb.errors.CommError("entity nobody not found during upsertBucket")

    monkeypatch.setattr(wandb, "init", refuse)  # no service is to be had here
    asked = replace(OFFLINE, entity="nobody", mode=TrackerMode.online)
    with (
        pytest.raises(UserError, match=r"tracking\.entity=nobody.*not found during"),
        tracking.open_tracker(asked, run, None, {}),
    ):
        pass


def test_an_adapter_is_kept_whatever_its_run_is_called(run: RunDir) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (run.path / name).write_text(name)
    with tracking.open_tracker(OFFLINE, run, None, {}) as tracker:
        tracker.adapter(run.path, run.path.name)
    assert written(run, "artifact").name == "a-run-gr-er"


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (KeyboardInterrupt(), 130), (Interrupted(143), 143), (RuntimeError("crash"), 1)],
    ids=lambda value: type(value).__name__,
)
def test_a_run_ends_at_wandb_as_what_it_became(run: RunDir, error: BaseException | None, code: int) -> None:
    def work() -> None:
        with tracking.open_tracker(OFFLINE, run, None, {}) as tracker:
            tracker.log({"loss": 1.0}, 1)
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    assert written(run, "exit").exit_code == code

"""A trial that dies, in whatever way, dies alone; started again, only it runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import dpo_lora

ORDER = ("fine", "raises", "killed", "exits", "hangs", "segfaults", "fine")


def _times(folder: Path) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def _by_model(sweep: Path) -> dict[str, dict[str, Any]]:
    facts = json.loads((sweep / "sweep.json").read_text())
    return {Path(t["varied"]["model.name"]).name: t for t in facts["trials"]}


LAUNCHERS = {
    "local": ["sweep.slots=3"],
    "slurm": ["hydra.launcher.cluster=local", "hydra.launcher.cpus=1", "hydra.launcher.jobs=2"],
    # A GPU is declared that nobody uses: half of it each lets two trials run side by side.
    "ray": ["hydra.launcher.cpus=1", "hydra.launcher.gpus=0.5"],
}


@pytest.fixture
def launcher(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The overrides of a launcher, and the Ray cluster that it needs."""
    words = [f"hydra/launcher={request.param}", *LAUNCHERS[request.param]]
    if request.param != "ray":
        yield words
        return
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 1, "include_dashboard": False})
    yield [*words, f"hydra.launcher.address={cluster.address}"]
    cluster.shutdown()


@pytest.mark.parametrize(
    "launcher",
    ["local", *(pytest.param(name, marks=pytest.mark.cluster) for name in ("slurm", "ray"))],
    indirect=True,
)
@pytest.mark.timeout(1200)
def test_every_fault_ends_its_own_trial_alone(
    models: Callable[[str, str], Path], tiny_overrides: list[str], launcher: list[str]
) -> None:
    limit = 30 if "hydra/launcher=local" in launcher else 90  # there every trial imports the stack
    names = [f"{number}-{fault}" for number, fault in enumerate(ORDER, 1)]
    folders = [models(name, fault) for name, fault in zip(names, ORDER, strict=True)]
    words = ["train", "-m", *(o for o in tiny_overrides if not o.startswith(("model.name=", "tracking=")))]
    words += [f"model.name={','.join(map(str, folders))}", "model.trust_remote_code=true"]
    # Sampled answers go to W&B as a table: by way of a folder that no trial may take from another.
    words += ["eval.samples=1", "eval.sample_tokens=8"]
    words += [*launcher, f"sweep.trial_timeout={limit}", "sweep.grace=1"]

    first = dpo_lora(*words)
    assert first.returncode == 5, first.stderr
    sweep = Path(first.stdout.strip().splitlines()[-1])
    trials = _by_model(sweep)
    assert [trials[name]["status"] for name in names] == ["finished", *["failed"] * 5, "finished"]
    reasons = [trials[name]["reason"] for name in names]
    assert reasons[1] == "RuntimeError: this model is cursed"
    assert reasons[2] == "killed by SIGKILL (out of memory, or by hand)"
    assert reasons[3] == "left with exit code 7 before it had finished"
    assert reasons[4] == f"ran past sweep.trial_timeout={limit} s and was stopped"
    assert reasons[5] == "killed by SIGSEGV (segmentation fault)"
    assert any("cursed" in line for line in trials["2-raises"]["log"])
    for reason in reasons[1:-1]:
        assert reason in first.stderr
    assert f"Run the failed again: dpo-lora resume {sweep} --retry\n" in first.stderr
    assert (sweep / "best").resolve().name in (trials["1-fine"]["id"], trials["7-fine"]["id"])

    for name in names[1:-1]:
        models(name, "fine")
    untouched = {name: _times(sweep / trials[name]["id"]) for name in ("1-fine", "7-fine")}
    again = dpo_lora("resume", str(sweep), "--retry")
    assert again.returncode == 0, again.stderr
    after = _by_model(sweep)
    assert {t["status"] for t in after.values()} == {"finished"}
    assert {name: t["id"] for name, t in after.items()} == {name: t["id"] for name, t in trials.items()}
    for name, before in untouched.items():
        assert _times(sweep / trials[name]["id"]) == before

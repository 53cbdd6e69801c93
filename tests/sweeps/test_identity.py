"""A trial is what it computes: started again, grown, retried or stopped, a sweep runs what is missing and no more."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from harness import CommandLine
from sweeps.instant import Killed, World, facts


def _sweep(outcome: object) -> Path:
    return Path(outcome.out.strip().splitlines()[-1])  # type: ignore[attr-defined]


def _betas(world: World) -> list[str]:
    return [trial.varied["dpo.beta"] for trial in world.started]


def test_a_grown_grid_runs_only_the_new_trials(cli: CommandLine, world: World, sweep_words: list[str]) -> None:
    first = cli(*sweep_words, "dpo.beta=0.05,0.1")
    assert first.code == 0, first.err
    assert _betas(world) == ["0.05", "0.1"]
    world.started.clear()
    again = cli(*sweep_words, "dpo.beta=0.05,0.1")
    assert (again.code, _sweep(again), world.started) == (0, _sweep(first), [])
    grown = cli(*sweep_words, "dpo.beta=0.1,0.2,0.05")
    assert (_sweep(grown), _betas(world)) == (_sweep(first), ["0.2"])
    summary = facts(_sweep(grown))
    assert summary["counts"] == {"finished": 3}
    assert summary["ranking"][0]["varied"] == {"dpo.beta": "0.1"}
    assert len(summary["sittings"]) == 3
    with (_sweep(grown) / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["dpo.beta"]: row["status"] for row in rows} == dict.fromkeys(("0.05", "0.1", "0.2"), "finished")
    best = (_sweep(grown) / "best").resolve().name
    assert best == next(row["trial"] for row in rows if row["dpo.beta"] == "0.1")


def test_a_value_that_cannot_be_leaves_no_sweep_and_changes_none(
    cli: CommandLine, world: World, sweep_words: list[str], tmp_path: Path
) -> None:
    refused = cli(*sweep_words, "dpo.beta=0.1,-1")
    assert (refused.code, world.started) == (2, [])
    assert "dpo.beta=-1" in refused.err
    assert not list(tmp_path.rglob("sweep.json"))
    sweep = _sweep(cli(*sweep_words, "dpo.beta=0.05,0.1"))
    before = facts(sweep)
    assert cli(*sweep_words, "dpo.beta=0.05,-1").code == 2
    assert facts(sweep) == before


def test_a_bad_value_in_a_later_batch_is_told_before_the_first(
    cli: CommandLine, world: World, sweep_words: list[str], tmp_path: Path
) -> None:
    words = [*sweep_words, "hydra.sweeper.max_batch_size=1"]
    refused = cli(*words, "dpo.beta=0.1,-1")
    assert (refused.code, world.started) == (2, [])
    assert not list((tmp_path / "outputs").glob("dpo-*"))
    done = cli(*words, "dpo.beta=0.05,0.1", "sweep.slots=2")
    assert (done.code, _betas(world)) == (0, ["0.05", "0.1"])
    assert facts(_sweep(done))["counts"] == {"finished": 2}
    assert [sitting["energy_joules"] for sitting in facts(_sweep(done))["sittings"]] == [3600.0, 3600.0]


def test_a_sweep_that_has_trained_is_kept_whatever_comes_after(
    cli: CommandLine, world: World, sweep_words: list[str], tmp_path: Path
) -> None:
    """Hydra's own sweeper hands over one batch after the other."""
    words = [*sweep_words, "hydra/sweeper=basic", "hydra.sweeper.max_batch_size=1"]
    refused = cli(*words, "dpo.beta=0.1,-1")
    assert (refused.code, _betas(world)) == (2, ["0.1"])
    (sweep,) = (tmp_path / "outputs").glob("dpo-*")
    assert (facts(sweep)["status"], facts(sweep)["counts"]) == ("finished", {"finished": 1})
    world.started.clear()
    assert cli(*words, "dpo.beta=0.1,0.2").code == 0
    assert _betas(world) == ["0.2"]
    assert facts(sweep)["counts"] == {"finished": 2}


def test_repeats_are_seeds_and_grow_too(cli: CommandLine, world: World, sweep_words: list[str]) -> None:
    cli(*sweep_words, "dpo.beta=0.05,0.1", "sweep.repeats=3")
    assert [(t.varied["dpo.beta"], t.seed) for t in world.started] == [
        (beta, seed) for beta in ("0.05", "0.1") for seed in (0, 1, 2)
    ]
    world.started.clear()
    four = cli(*sweep_words, "dpo.beta=0.05,0.1", "sweep.repeats=4")
    assert [t.seed for t in world.started] == [3, 3]
    best, other = facts(_sweep(four))["ranking"]
    assert (best["varied"], best["seeds"]) == ({"dpo.beta": "0.1"}, [0, 1, 2, 3])
    figures = {t["id"]: t["figures"]["accuracy"] for t in facts(_sweep(four))["trials"]}
    assert best["value"] == pytest.approx(sum(figures[name] for name in best["trials"]) / 4)
    assert other["paired"] > 0


def test_the_exit_code_counts_failures_and_retry_runs_exactly_those(
    cli: CommandLine, world: World, sweep_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fails = lambda settings: settings["dpo"]["beta"] > 0.1
    first = cli(*sweep_words, "dpo.beta=0.05,0.1,0.2,0.3")
    assert first.code == 2
    assert "RuntimeError: as the test wants it" in first.err
    world.started.clear()
    left_alone = cli(*sweep_words, "dpo.beta=0.05,0.1,0.2,0.3")
    assert (left_alone.code, world.started) == (2, [])
    world.fails = lambda settings: False
    monkeypatch.chdir(tmp_path)  # the directory alone says how to go on
    (sweep,) = (tmp_path / "outputs").glob("dpo-*")
    other = cli("resume", str(sweep), "dpo.beta=0.4")
    assert (other.code, world.started) == (2, [])
    assert "another sweep" in other.err
    again = cli("resume", str(sweep), "--retry", "sweep.trial_timeout=600")
    assert again.code == 0, again.err
    assert _betas(world) == ["0.2", "0.3"]
    assert "sweep.trial_timeout=600" in facts(sweep)["command"]


def test_a_trial_that_somebody_else_stopped_is_named_and_counted(
    cli: CommandLine, world: World, sweep_words: list[str]
) -> None:
    world.cut_off = lambda settings: settings["dpo"]["beta"] == 0.1
    world.fails = lambda settings: settings["dpo"]["beta"] == 0.2
    done = cli(*sweep_words, "dpo.beta=0.05,0.1,0.2")
    assert done.code == 2  # one failed, one is not finished
    sweep = _sweep(done)
    assert (facts(sweep)["status"], facts(sweep)["counts"]["interrupted"]) == ("interrupted", 1)
    assert "dpo.beta=0.1 seed=0\n  stopped by SIGTERM from outside\n" in done.err
    assert f"1 not finished. Go on: dpo-lora resume {sweep}\n" in done.err
    assert cli(*sweep_words, "dpo.beta=0.05,0.3").code == 1  # the failed one; nobody asks for the other any more
    assert facts(sweep)["status"] == "failed"
    world.cut_off = world.fails = lambda settings: False
    world.started.clear()
    assert cli(*sweep_words, "dpo.beta=0.05,0.1,0.2", "sweep.retry=failed").code == 0
    assert _betas(world) == ["0.1", "0.2"]


def test_another_tracker_is_taken_up_where_the_sweep_goes_on(
    cli: CommandLine, world: World, sweep_words: list[str], tmp_path: Path
) -> None:
    world.stop_after = 1
    stopped = cli(*sweep_words, "tracking=tensorboard", "dpo.beta=0.05,0.1")
    assert stopped.code == 130, stopped.err
    assert world.started[0].settings["tracking"]["kind"] == "tensorboard"
    world.stop_after = None
    world.started.clear()
    done = cli(*sweep_words, "dpo.beta=0.05,0.1")
    assert (done.code, facts(_sweep(done))["counts"]) == (0, {"finished": 2})
    assert [trial.settings["tracking"]["kind"] for trial in world.started] == ["none", "none"]
    assert _betas(world) == ["0.05", "0.1"]
    assert len(list((tmp_path / "outputs").glob("dpo-*"))) == 1


def test_seconds_are_of_training_wherever_they_are_told(cli: CommandLine, world: World, sweep_words: list[str]) -> None:
    sweep = _sweep(cli(*sweep_words, "dpo.beta=0.05,0.1", "sweep.objectives=[seconds]"))
    assert {entry["value"] for entry in facts(sweep)["ranking"]} == {8.0}
    with (sweep / "trials.csv").open() as file:
        assert {row["seconds"] for row in csv.DictReader(file)} == {"8.0"}
    assert "<td>18 s</td>" in (sweep / "report.html").read_text()  # with all else: 9 s a trial


def test_ctrl_c_stops_in_order_and_resume_goes_on(
    cli: CommandLine, world: World, sweep_words: list[str], tmp_path: Path
) -> None:
    world.stop_after = 2
    stopped = cli(*sweep_words, "dpo.beta=0.05,0.1,0.2")
    assert stopped.code == 130
    (sweep,) = (tmp_path / "outputs").glob("dpo-*")
    assert facts(sweep)["status"] == "interrupted"
    assert facts(sweep)["counts"] == {"finished": 1, "interrupted": 1, "waiting": 1}
    world.stop_after = None
    world.started.clear()
    resumed = cli("resume", "latest", "--outputs", str(tmp_path / "outputs"))
    assert resumed.code == 0
    assert _betas(world) == ["0.1", "0.2"]
    assert facts(sweep)["counts"] == {"finished": 3}
    told = [line.split()[:3:2] for line in resumed.err.splitlines() if "dpo.beta=" in line]
    assert told == [["1/3", "running"], ["2/3", "finished"], ["2/3", "running"], ["3/3", "finished"]]


def test_a_killed_sweep_is_found_and_finished(
    cli: CommandLine, world: World, sweep_words: list[str], tmp_path: Path
) -> None:
    world.kill_after = 1
    with pytest.raises(Killed):
        cli(*sweep_words, "dpo.beta=0.05,0.1,0.2", "sweep.objectives=[margin]", "eval.confidence=0.8")
    world.kill_after = None
    world.started.clear()
    (sweep,) = (tmp_path / "outputs").glob("dpo-*")
    shown = cli("status", str(sweep))
    assert "1 finished" in shown.out and "dpo-lora resume" in shown.out
    assert "Ranking by margin" in shown.out and "80 % interval" in shown.out  # its own, before any summary was written
    assert "has no summary yet" in cli("report", str(sweep)).err
    assert cli("resume", str(sweep)).code == 0
    assert _betas(world) == ["0.1", "0.2"]


def test_what_trials_share_is_prepared_once(cli: CommandLine, world: World, sweep_words: list[str]) -> None:
    cli(*sweep_words, "dpo.beta=0.05,0.1", "lora.r=4,8")
    assert len(world.shared) == 1
    cli(*sweep_words, "dpo.beta=0.05,0.1,0.2", "lora.r=4,8")
    assert len(world.shared) == 1  # it is done
    world.shared.clear()
    cli(*sweep_words, "dpo.beta=0.3,0.4", "data.max_length=64,128")
    assert len(world.shared) == 2
    world.shared.clear()
    cli(*sweep_words, "data.max_length=256,512")
    assert world.shared == []  # each for one trial alone


def test_another_launcher_is_hydras_own(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    """With the basic launcher a sweep is what Hydra makes of it: numbered folders, all in one process."""
    words = [*tiny_overrides, "hydra/launcher=basic", "lora.r=2,4", "eval.samples=0"]
    done = cli("train", "-m", *words)
    assert done.code == 0, done.err
    assert sorted(p.parent.name for p in (tmp_path / "outputs").glob("*/*/adapter_model.safetensors")) == ["0", "1"]

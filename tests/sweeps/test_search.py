"""Studies: every sampler and pruner, several objectives, failures, totals, and what earlier sweeps teach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from dpo_lora.errors import UserError
from dpo_lora.sweeps import search, space
from dpo_lora.sweeps.search import PRUNERS, SAMPLERS
from harness import CommandLine
from sweeps.instant import Killed, World, facts

SPACE = ["dpo.beta=tag(log,interval(0.01,1))", "train.learning_rate=tag(log,interval(1e-5,1e-3))"]


@pytest.fixture
def study(cli: CommandLine, world: World, sweep_words: list[str], tmp_path: Path) -> Any:
    """``study(*overrides)``: the exit code and what sweep.json says afterwards."""

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        preset = [] if any(w.startswith("hydra/sweeper=") for w in words) else ["hydra/sweeper=study"]
        done = cli(*sweep_words, *preset, "hydra.sweeper.trials=12", "sweep.objectives=[margin]", *words)
        sweeps = sorted((tmp_path / "outputs").glob("dpo-*/sweep.json"), key=lambda f: f.stat().st_mtime_ns)
        assert sweeps, done.err
        return done.code, facts(sweeps[-1].parent)

    return run


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("dpo.beta=interval(0.1,1)", FloatDistribution(0.1, 1.0)),
        ("dpo.beta=tag(log,interval(0.01,1))", FloatDistribution(0.01, 1.0, log=True)),
        ("lora.r=int(interval(4,64))", IntDistribution(4, 64)),
        ("lora.r=range(4,17,4)", IntDistribution(4, 16, step=4)),
        ("dpo=choice(sigmoid,ipo)", CategoricalDistribution(["sigmoid", "ipo"])),
        ("lora.r=8,16", CategoricalDistribution(["8", "16"])),
    ],
)
def test_hydras_words_become_distributions(typed: str, expected: object) -> None:
    def read(words: str) -> object:
        return space.distribution(OverridesParser.create().parse_overrides([words])[0])

    found = read(typed)
    assert found == expected
    assert read(f"x={space.words(found)}") == expected  # type: ignore[arg-type]  # and back


def test_a_space_that_cannot_be_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="cannot be searched"):
        space.distribution(OverridesParser.create().parse_overrides(["dpo.beta=tag(log,interval(0,1))"])[0])


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "grid"])
def test_every_sampler_runs_its_total(study: Any, world: World, sampler: str) -> None:
    code, found = study(f"hydra.sweeper.sampler={sampler}", "hydra.sweeper.startup_trials=4", *SPACE)
    assert code == 0
    assert found["study"]["sampler"] == sampler
    assert [t["state"] for t in found["study"]["trials"]] == ["complete"] * 12
    assert len({tuple(t["params"].values()) for t in found["study"]["trials"]}) == 12
    if sampler in ("tpe", "gp", "cmaes"):  # those that learn come nearer to the best than chance started
        values = [t["values"][0] for t in found["study"]["trials"]]
        assert max(values[4:]) > max(values[:4])


def test_grid_tries_every_combination_once(study: Any, world: World) -> None:
    words = ["hydra.sweeper.sampler=grid", "dpo.beta=0.05,0.1,0.2", "lora.r=range(4,9,4)"]
    code, found = study(*words, "hydra.sweeper.trials=4")
    assert (code, len(found["study"]["trials"])) == (0, 4)
    code, found = study(*words, "hydra.sweeper.trials=100")
    assert code == 0
    tried = [(t["params"]["dpo.beta"], t["params"]["lora.r"]) for t in found["study"]["trials"]]
    assert tried == [(beta, r) for beta in ("0.05", "0.1", "0.2") for r in (4, 8)]


@pytest.mark.parametrize("pruner", [name for name in PRUNERS if name != "none"])
def test_every_pruner_stops_hopeless_trials(study: Any, world: World, pruner: str) -> None:
    words = ["hydra/sweeper=study-pruned", f"hydra.sweeper.pruner={pruner}", "hydra.sweeper.startup_trials=3"]
    code, found = study(*words, "hydra.sweeper.sampler=random", "eval.every=1", *SPACE)
    assert code == 0
    states = [t["state"] for t in found["study"]["trials"]]
    assert len(states) == 12
    assert set(states) == {"complete", "pruned"}
    pruned = [t for t in found["trials"] if t["status"] == "pruned"]
    assert len(pruned) == states.count("pruned")
    assert world.signals == []  # the answer is enough: a trial stops itself
    assert all("behind the others" in t["reason"] for t in pruned)
    worth = {t["id"]: abs(float(t["varied"]["dpo.beta"])) for t in found["trials"]}
    assert found["best"] in worth and found["best"] not in {t["id"] for t in pruned}


def test_a_study_killed_twice_equals_an_undisturbed_one(
    study: Any, world: World, cli: CommandLine, tmp_path: Path, sweep_words: list[str]
) -> None:
    words = ["hydra/sweeper=study-pruned", "hydra.sweeper.startup_trials=3", "eval.every=2", *SPACE]
    _, calm = study(*words, "hydra.sweep.dir=" + str(tmp_path / "outputs" / "dpo-calm"))
    rough = str(tmp_path / "outputs" / "dpo-rough")
    for kills in (4, 4):
        world.kill_after = len(world.started) + kills
        with pytest.raises(Killed):
            study(*words, f"hydra.sweep.dir={rough}")
    world.kill_after = None
    assert cli("resume", rough).code == 0
    after = facts(Path(rough))
    assert after["study"]["trials"] == calm["study"]["trials"]
    assert after["best"] == calm["best"]
    assert {t["state"] for t in calm["study"]["trials"]} == {"complete", "pruned"}


def test_a_study_goes_on_to_a_larger_total(study: Any, world: World) -> None:
    study("hydra.sweeper.trials=4", *SPACE)
    first = [trial.id for trial in world.started]
    code, found = study("hydra.sweeper.trials=7", *SPACE)
    assert (code, len(world.started)) == (0, 7)
    assert len(found["study"]["trials"]) == 7
    assert set(first) < {t["id"] for t in found["trials"]}


def test_failed_trials_do_not_end_a_study_and_can_be_retried(study: Any, world: World) -> None:
    world.fails = lambda settings: settings["dpo"]["beta"] > 0.2
    code, found = study("hydra.sweeper.sampler=random", *SPACE)
    states = [t["state"] for t in found["study"]["trials"]]
    assert len(states) == 12
    assert code == states.count("fail") > 0
    world.fails = lambda settings: False
    world.started.clear()
    code, found = study("hydra.sweeper.sampler=random", *SPACE, "sweep.retry=failed")
    assert code == 0
    assert len(world.started) == states.count("fail")
    assert [t["state"] for t in found["study"]["trials"]] == ["complete"] * 12


@pytest.mark.parametrize("change", ["dpo.beta=0.05,0.1,0.2", "sweep.objectives=[loss]"])
def test_a_study_keeps_its_space_and_a_new_one_learns_from_it(
    study: Any, world: World, cli: CommandLine, sweep_words: list[str], tmp_path: Path, change: str
) -> None:
    words = ["dpo.beta=0.05,0.1", "train.learning_rate=tag(log,interval(1e-5,1e-3))", "hydra.sweeper.trials=3"]
    _, before = study(*words)
    (sweep,) = (tmp_path / "outputs").glob("dpo-*")
    world.started.clear()
    changed = [*words, change]
    refused = cli(*sweep_words, "hydra/sweeper=study", "sweep.objectives=[margin]", *changed)
    assert (refused.code, world.started, facts(sweep)) == (2, [], before)
    was, now = {"d": ("dpo.beta=0.05,0.1,", "now 0.05,0.1,0.2"), "s": ("=[margin],", "now [loss]")}[change[0]]
    for part in (was, now, "hydra.sweep.dir=FOLDER", f"hydra.sweeper.warm_start=[{sweep}]"):
        assert part in refused.err
    assert "Traceback" not in refused.err
    assert cli("resume", str(sweep)).code == 0  # the earlier one is as it was
    apart = [f"hydra.sweep.dir={tmp_path / 'outputs' / 'dpo-new'}", f"hydra.sweeper.warm_start=[{sweep}]"]
    code, found = study(*changed, *apart)
    assert (code, len(found["study"]["trials"])) == (0, 3)


def test_a_study_that_did_not_keep_its_space_is_known_by_its_trials() -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trial(
        optuna.trial.create_trial(params={"x": "a"}, distributions={"x": CategoricalDistribution(["a"])}, value=1.0)
    )
    assert search._changes(study, ["margin"], {"x": CategoricalDistribution(["a"])}) == []
    assert search._changes(study, ["accuracy"], {"x": CategoricalDistribution(["a", "b"])}) == ["x=a, and now a,b"]
    assert search._changes(study, ["loss"], {}) == ["sweep.objectives=others, and now [loss]"]


def test_a_figure_that_does_not_exist_ends_no_study(study: Any, world: World) -> None:
    world.lacks = lambda settings: {"accuracy_length_controlled", "margin"} if settings["dpo"]["beta"] > 0.1 else set()
    words = ["hydra/sweeper=study-pruned", "hydra.sweeper.sampler=random", "hydra.sweeper.startup_trials=1"]
    objective = "sweep.objectives=[accuracy_length_controlled]"
    code, found = study(*words, *SPACE, "eval.every=2", objective)
    assert code == 0
    assert found["counts"] == {"finished": 12}
    lacking = [t for t in found["study"]["trials"] if t["params"]["dpo.beta"] > 0.1]
    assert lacking and {t["state"] for t in lacking} == {"fail"}
    assert all("accuracy_length_controlled" in t["reason"] for t in lacking)
    assert [t["state"] for t in found["study"]["trials"]].count("complete") == 12 - len(lacking) > 0


def test_several_objectives_have_a_front(study: Any, world: World) -> None:
    code, found = study("sweep.objectives=[margin,seconds]", *SPACE)
    assert code == 0
    assert all(len(t["values"]) == 2 for t in found["study"]["trials"])
    assert found["study"]["front"]


def test_a_study_learns_from_an_earlier_sweep(
    study: Any, world: World, cli: CommandLine, sweep_words: list[str]
) -> None:
    done = cli(*sweep_words, "dpo.beta=0.03,0.1,0.5", "train.learning_rate=1e-4")
    earlier = done.out.strip().splitlines()[-1]
    world.started.clear()
    words = [f"hydra.sweeper.warm_start=[{earlier}]", "hydra.sweeper.startup_trials=3", "hydra.sweeper.trials=3"]
    code, found = study(*words, *SPACE)
    assert code == 0
    assert len(found["study"]["trials"]) == len(world.started) == 3  # the earlier three do not count into the total
    _, cold = study(*words[1:], *SPACE, "hydra.sweeper.warm_start=[]", "train.warmup=0.2")
    warm = [t["params"] for t in found["study"]["trials"]]
    assert warm != [t["params"] for t in cold["study"]["trials"]]  # it drew by what the earlier ones had shown


@pytest.mark.parametrize("preset", ["beta-lr", "rank", "loss-family"])
def test_spaces_as_presets(study: Any, world: World, preset: str) -> None:
    code, found = study(f"hydra/sweeper={preset}", "hydra.sweeper.trials=3")
    assert code == 0
    assert {len(t["params"]) for t in found["study"]["trials"]} == {2}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "needs something to search"),
        ([*SPACE, "hydra.sweeper.sampler=magic"], "there are tpe"),
        ([*SPACE, "hydra.sweeper.sampler=grid"], "list values"),
        ([*SPACE, "hydra.sweeper.pruner=median"], "set eval.every"),
        ([*SPACE, "hydra.sweeper.pruner=median", "eval.every=2", "sweep.repeats=2"], "single trials"),
        ([*SPACE, "hydra.sweeper.warm_start=[nowhere]"], "holds no trials"),
    ],
)
def test_a_study_that_cannot_be_is_refused(
    cli: CommandLine, world: World, sweep_words: list[str], tmp_path: Path, words: list[str], told: str
) -> None:
    done = cli(*sweep_words, "hydra/sweeper=study", *words)
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "outputs").glob("dpo-*"))
    assert told in cli("plan", *sweep_words[1:], "hydra/sweeper=study", *words).err

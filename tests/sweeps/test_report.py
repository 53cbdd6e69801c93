"""What a sweep came to on its page, and what it would cost before it starts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harness import CommandLine
from sweeps.instant import World


def test_the_page_holds_every_part(cli: CommandLine, world: World, sweep_words: list[str]) -> None:
    world.fails = lambda settings: settings["dpo"]["beta"] == 0.4 and settings["lora"]["r"] == 16
    done = cli(*sweep_words, "dpo.beta=0.05,0.1,0.4", "train.learning_rate=5e-5,1e-4", "lora.r=8,16", "sweep.repeats=2")
    assert done.code == 4
    page = (Path(done.out.strip().splitlines()[-1]) / "report.html").read_text()
    for part in (
        ">Ranking<", "95 % interval", "best minus this", "not distinguishable",  # and how sure that is
        ">What mattered<", "importance", "dpo.beta with train.learning_rate, beyond each alone",
        "Training loss of 20 trials",
        "Parallel coordinates: 20 trials across dpo.beta, train.learning_rate, lora.r, accuracy",
        ">Failures<", "RuntimeError: as the test wants it",
        ">Cost<", "From start to end", "Energy", "0.001 kWh", "Tokens they trained on", "Highest memory of one trial",
        "dpo-lora train -m", "dpo-lora train model=hub",  # all of it again; the best alone
        "Compared pair by pair on the same", "with more values only those",
    ):  # fmt: skip
        assert part in page, part

    sweep = Path(done.out.strip().splitlines()[-1])
    index = Path(cli("report", str(sweep.parent)).out.strip().splitlines()[-1]).read_text()
    [row] = re.findall(r'<tr data-status="failed" data-kind="sweep">(.*?)</tr>', index, re.DOTALL)
    best = json.loads((sweep / "sweep.json").read_text())["ranking"][0]
    for part in (
        f'<a href="./{sweep.name}/report.html">', "4 failed, 20 finished",
        "best dpo.beta=0.1 train.learning_rate=0.0001 lora.r=",
        f">{best['value']:.3f}<", f">{best['interval'][0]:.3f} to {best['interval'][1]:.3f}<",
    ):  # fmt: skip
        assert part in row, part
    assert index.count('data-kind="trial"') == 24
    kinds = re.findall(r'data-kind="(\w+)"', index[index.index("<tbody") :])
    assert kinds == ["sweep", *["trial"] * 24], "a sweep comes before its trials"


def test_the_plan_says_it_before_anything_starts(cli: CommandLine, world: World, sweep_words: list[str]) -> None:
    words = ["plan", *sweep_words[1:], "dpo.beta=0.05,0.1", "lora.r=8,16", "sweep.repeats=3", "data.max_heldout=50"]
    told = cli(*words)
    assert told.code == 0, told.err
    for line in (
        "Trials: 12 (4 settings, 3 seeds each); 12 to run",
        "At a time: 1",
        "Shared, done once: base model, pairs and reference log-probabilities, for each of 3 combinations",
        "Time and memory: unknown",
        "Held-out pairs: 50. Best against 3 others, paired: differences in accuracy from about 0.229",
        "That is coarse",
    ):
        assert line in told.out, told.out
    assert world.started == []
    done = cli("train", *words[1:])
    assert done.code == 0, done.err
    again = cli(*words).out
    assert "12 finished, nothing is left to run" in again
    assert "One trial: about 9 s, 1.0 GiB (from 12 finished runs of this base model)" in again


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sweep.objectives=[margin]"], "Compared by value alone: margin has no interval here."),
        (["sweep.objectives=[margin]", "sweep.repeats=2"], "own intervals, not pair by pair; intervals of the"),
    ],
)
def test_the_page_says_how_settings_were_compared(
    cli: CommandLine, world: World, sweep_words: list[str], words: list[str], told: str
) -> None:
    done = cli(*sweep_words, "dpo.beta=0.05,0.1", *words)
    page = (Path(done.out.strip().splitlines()[-1]) / "report.html").read_text().replace("&#39;", "'")
    assert told in page
    assert "Compared pair by pair" not in page


def test_figures_that_do_not_exist_are_left_out(cli: CommandLine, world: World, sweep_words: list[str]) -> None:
    words = [*sweep_words, "dpo.beta=0.05,0.1,0.2", "sweep.objectives=[accuracy_length_controlled]"]
    world.lacks = lambda settings: {"accuracy_length_controlled", "margin"} if settings["dpo"]["beta"] > 0.1 else set()
    done = cli(*words)
    assert done.code == 0, done.err
    sweep = Path(done.out.strip().splitlines()[-1])
    page = (sweep / "report.html").read_text()
    assert "1 finished trial has no finite accuracy_length_controlled and cannot be ranked." in page
    assert "Parallel coordinates: 2 trials" in page
    assert "<td>27 s</td>" in page  # what all three took
    world.lacks = lambda settings: {"accuracy_length_controlled", "margin", "loss"}
    done = cli(*words, f"hydra.sweep.dir={sweep.parent / 'dpo-none'}")
    assert done.code == 0, done.err
    page = (sweep.parent / "dpo-none" / "report.html").read_text()
    assert "3 finished trials have no finite accuracy_length_controlled" in page
    assert "No trial has finished" not in page


def test_a_studys_page_does_not_invite_to_change_its_space(
    cli: CommandLine, world: World, sweep_words: list[str]
) -> None:
    words = ["hydra/sweeper=study", "hydra.sweeper.sampler=grid", "dpo.beta=0.05,0.1,0.2"]
    planned = cli("plan", *sweep_words[1:], *words)
    assert "Trials: 3, each chosen when it is due; 3 to run" in planned.out, planned.err
    done = cli(*sweep_words, *words)
    assert done.code == 0, done.err
    assert ": 3 trials, 1 at a time" in done.err
    page = (Path(done.out.strip().splitlines()[-1]) / "report.html").read_text()
    assert "hydra.sweeper.warm_start=[SWEEP]" in page
    assert "with more values only those" not in page


def test_a_plan_after_a_smoke_run_counts_the_pairs_that_are_planned(
    cli: CommandLine, world: World, sweep_words: list[str]
) -> None:
    planned = ["plan", *sweep_words[1:], "dpo.beta=0.05,0.1", "train.max_steps=null", "train.epochs=2"]
    assert cli(*sweep_words, "dpo.beta=0.3", "data.max_pairs=16").code == 0  # 80 pairs in 8 s, and 1 s for the rest
    told = cli(*planned).out
    assert "One trial: about 2 min for every 1,000 training pairs" in told, told
    assert "is unknown until a run has read it" in told
    assert "What is to run" not in told
    assert "One trial: about 3 s, " in cli(*planned, "data.max_pairs=8").out  # 8 of its 16, twice: 1.6 s
    assert cli(*sweep_words, "dpo.beta=0.4").code == 0  # reads all 400
    assert "One trial: about 81 s, " in cli(*planned).out
    assert "One trial: about 21 s, " in cli(*planned, "data.max_pairs=100").out

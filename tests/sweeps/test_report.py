"""What a sweep came to on its page, and what it would cost before it starts."""

from __future__ import annotations

import json
import re
from pathlib import Path

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

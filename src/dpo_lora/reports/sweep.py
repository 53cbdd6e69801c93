"""A sweep's directory as one page: ranking, what cannot be told from the best, effects, costs, failures."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from dpo_lora.errors import UserError
from dpo_lora.files import read_jsonl, write_atomic
from dpo_lora.reports import drawing, effects
from dpo_lora.reports.drawing import Drawing, Line
from dpo_lora.reports.pages import render, shown

_MOST_LINES = 60  # learning curves in one drawing
_SITTINGS_TOLD = 3  # each for itself; of more their sum


def write(sweep: Path) -> Path:
    """Write report.html beside sweep.json; returns its path."""
    file = sweep / "report.html"
    write_atomic(file, page(sweep))
    return file


def page(sweep: Path) -> str:
    """The page, from sweep.json and the trials' metrics.

    Raises:
        UserError: the sweep has not written its summary yet.
    """
    facts: dict[str, Any] = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))
    if "trials" not in facts:
        raise UserError(
            f"{sweep} has no summary yet: it is written when the sweep ends or is stopped. 'dpo-lora status {sweep}' "
            f"says how it stands; if it was killed, 'dpo-lora resume {sweep}' goes on with it."
        )
    objective = facts["objectives"][0]
    done = [t for t in facts["trials"] if t["status"] == "finished"]
    finished = [t for t in done if t["figures"].get(objective) is not None]
    columns = {name: [t["varied"].get(name, "") for t in finished] for name in facts["varies"]}
    values = [float(t["figures"][objective]) for t in finished]
    main = effects.main_effects(columns, values) if len(finished) > 1 else []
    return render(
        "sweep.html.j2",
        title=sweep.name,
        facts=facts,
        objective=objective,
        level=f"{100 * facts['confidence']:g} %",
        close=_close(facts["ranking"]),
        single_seed=all(len(entry["seeds"]) == 1 for entry in facts["ranking"]),
        effects=main,
        pairs=effects.pairs(columns, values) if len(finished) > 1 else [],
        lacking=len(done) - len(finished),
        drawings=[d for d in (_ranking(facts), *_curves(sweep, facts)) if d is not None],
        parallel=_parallel(facts, finished),
        effect_drawings=[d for d in (_effect(effect, objective) for effect in main) if d is not None],
        reported={t["id"] for t in facts["trials"] if (sweep / t["id"] / "report.html").is_file()},
        costs=_costs(facts, done),
        failures=[
            {**t, "reason": shown(t["reason"]), "log": shown("\n".join(t.get("log", [])))}
            for t in facts["trials"]
            if t["status"] == "failed"
        ],
        again=shlex.join(str(word) for word in facts["command"]),
        best=_best_command(sweep, facts),
    )


def _close(ranking: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best and whatever cannot be told from it."""
    return [entry for entry in ranking if not entry["distinguishable"]]


def name_of(entry: dict[str, Any]) -> str:
    """A setting by what is varied."""
    return " ".join(f"{name}={value}" for name, value in entry["varied"].items()) or "the only setting"


def _ranking(facts: dict[str, Any]) -> Drawing | None:
    rows = [
        (
            f"{place}. {' / '.join(entry['varied'].values())}",
            entry["value"],
            *(entry["interval"] or (entry["value"], entry["value"])),
        )
        for place, entry in enumerate(facts["ranking"][:30], 1)
    ]
    return drawing.intervals("Ranking", rows, unit=facts["objectives"][0], width=drawing.MIDDLE)


def _curves(sweep: Path, facts: dict[str, Any]) -> list[Drawing | None]:
    trials = [t for t in facts["trials"] if (sweep / t["id"] / "metrics.jsonl").exists()][:_MOST_LINES]
    best = next((n for n, t in enumerate(trials) if t["id"] == facts["best"]), -1)
    rows = [list(read_jsonl(sweep / t["id"] / "metrics.jsonl")) for t in trials]

    def lines(figure: str) -> list[Line]:
        found = []
        for trial, part in zip(trials, rows, strict=True):
            seen = [r for r in part if r.get(figure) is not None]
            found.append(Line(name_of(trial), [r["step"] for r in seen], [r[figure] for r in seen]))
        return found

    return [
        drawing.overlay("Training loss", lines("loss"), best, unit="loss"),
        drawing.overlay("Held-out accuracy", lines("eval/accuracy"), best, unit="accuracy", level=0.5),
    ]


def _parallel(facts: dict[str, Any], finished: list[dict[str, Any]]) -> Drawing | None:
    objective = facts["objectives"][0]
    rows = [
        [*(_number(t["varied"].get(name, "")) for name in facts["varies"]), float(t["figures"][objective])]
        for t in finished
    ]
    best = next((n for n, t in enumerate(finished) if t["id"] == facts["best"]), -1)
    return drawing.parallel("Parallel coordinates", [*facts["varies"], objective], rows, best)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _effect(effect: effects.Effect, objective: str) -> Drawing | None:
    rows = [(f"{level} ({count})", mean, mean - error, mean + error) for level, mean, error, count in effect.levels]
    return drawing.intervals(effect.name, rows, unit=f"mean {objective}, ± one standard error (trials)")


def _costs(facts: dict[str, Any], finished: list[dict[str, Any]]) -> list[tuple[str, str]]:
    def total(name: str) -> float:
        return float(sum(t["figures"][name] for t in finished))

    def whole(figures: dict[str, Any]) -> float:
        return float(figures.get("total_seconds", figures["seconds"]))  # one name for both, in older sweeps

    counts = ", ".join(f"{number} {name}" for name, number in facts["counts"].items())
    peak = max((t["figures"]["peak_memory_bytes"] for t in finished), default=0)
    sittings = facts.get("sittings", [])  # a sweep that was never gone on with may be older than they are
    known = [s["energy_joules"] for s in sittings if s["energy_joules"] is not None]
    energy = f"{sum(known) / 3.6e6:.3g} kWh of the devices it ran on" if known else "not told by this machine's devices"
    costs = [("Trials", counts), ("From start to end", _sittings(sittings)), ("Energy", energy)]
    if not finished:
        return costs
    return [
        *costs,
        ("Finished trials' time, added up", f"{sum(whole(t['figures']) for t in finished):.0f} s"),
        ("Tokens they trained on", f"{total('tokens'):,.0f}"),
        ("Highest memory of one trial", f"{peak / 2**30:.2f} GiB"),
    ]


def _sittings(sittings: list[dict[str, Any]]) -> str:
    """How long the sweep ran, each time that it was started or gone on with."""
    if len(sittings) > _SITTINGS_TOLD:
        return f"{sum(s['seconds'] for s in sittings):.0f} s, started {len(sittings)} times"
    return " + ".join(f"{s['seconds']:.0f} s, {s['slots']} at a time" for s in sittings)


def _best_command(sweep: Path, facts: dict[str, Any]) -> str | None:
    """The single run that makes the best trial again."""
    if facts["best"] is None:
        return None
    trial = json.loads((sweep / facts["best"] / "trial.json").read_text(encoding="utf-8"))
    return shlex.join(["dpo-lora", "train", *(w for w in trial["overrides"] if not w.startswith(("sweep.", "hydra")))])

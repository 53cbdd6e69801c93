"""A sweep in the terminal: a live table, or a line an event where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED, RUNNING
from dpo_lora.sweeps import summary
from dpo_lora.sweeps.directory import SweepDir
from dpo_lora.sweeps.trial import PRUNED, WAITING, Trial, read_all

_STYLES = {FINISHED: "green", FAILED: "red", INTERRUPTED: "yellow", RUNNING: "cyan", PRUNED: "magenta", WAITING: "dim"}
_REFRESH = 1.0  # seconds between redraws: each reads the running trials' metrics


def terminal() -> Console:
    """stderr; lines of a log file are not cut to the width of a screen that is not there."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=160)


class Watch:
    """Shows one sweep while it runs."""

    def __init__(self, console: Console, sweep: SweepDir, slots: int):
        self.console, self.sweep, self.slots = console, sweep, slots
        self.expected = 0  # trials in all, as far as known
        self._begun, self._drawn = time.monotonic(), 0.0
        self._over_before: set[str] = set()
        self._seen = 0, 0.0  # trials that have ended since the begin, and when that was seen
        self._told: dict[str, str] = {}
        self._rows: dict[str, dict[str, Any]] = {}  # a trial's files are read when it changes, and while it runs
        self._live: Live | None = None

    def __enter__(self) -> Watch:
        trials = read_all(self.sweep.path)
        self._told = {t.id: t.status(live=False) for t in trials}
        self._over_before = self._over()
        if self.console.is_terminal:
            self._rows = {t.id: summary.row(t, live=False) for t in trials}
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def changed(self, trial: Trial, running: list[Trial]) -> None:
        status = RUNNING if trial.id in {t.id for t in running} else trial.status(live=False)
        if self._told.get(trial.id) == status:
            return
        self._told[trial.id] = status
        self._rows[trial.id] = row = summary.row(trial, live=status == RUNNING)
        if self._live is None:
            self.say(self._line(status, row))
        else:
            self.tick(running, now=True)

    def tick(self, running: list[Trial], now: bool = False) -> None:
        if self._live is None or not (now or time.monotonic() - self._drawn > _REFRESH):
            return
        self._drawn = time.monotonic()
        self._rows |= {t.id: summary.row(t, live=True) for t in running}
        rows = list(self._rows.values())
        shown = Group(trials_table(rows, self.sweep.path.name), Text(self._footer(rows), "dim"))
        self._live.update(shown, refresh=True)

    def _line(self, status: str, line: dict[str, Any]) -> str:
        facts = [f"{len(self._over())}/{max(self.expected, len(self._told))}", line["id"][:8], status, label(line)]
        if status == FINISHED:
            facts.append(f"accuracy {line['figures']['accuracy']:.3f}  {line['figures']['total_seconds']:.0f} s")
        elif line["reason"]:
            facts.append(line["reason"])
        if status != RUNNING and (left := self._left()):
            facts.append(left)
        return "  ".join(facts)

    def _footer(self, rows: list[dict[str, Any]]) -> str:
        busy = sum(line["status"] == RUNNING for line in rows)
        done = f"{len(self._over())} of {max(self.expected, len(rows))} done"
        return f"{done}, {busy} of {self.slots} slots busy  {self._left()}"

    def _over(self) -> set[str]:
        """Trials that have come to their end, as far as told; a failed one may yet be tried again."""
        return {name for name, status in self._told.items() if status in (FINISHED, FAILED, PRUNED)}

    def _left(self) -> str:
        """About how long the rest takes, by what this process has seen."""
        over = self._over()
        fresh = over - self._over_before
        left = max(0, self.expected - len(over))
        if not fresh or not left:
            return ""
        if len(fresh) != self._seen[0]:
            self._seen = len(fresh), time.monotonic()
        count, at = self._seen
        # At the rate at which trials had ended when the last one did; since then time has gone by.
        seconds = (at - self._begun) / count * left - (time.monotonic() - at)
        return f"about {duration(seconds)} left" if seconds > 0 else ""


def duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def label(line: dict[str, Any]) -> str:
    """A trial by what is varied: ``dpo.beta=0.1 seed=1``."""
    return " ".join([*(f"{name}={value}" for name, value in line["varied"].items()), f"seed={line['seed']}"])


def trials_table(rows: list[dict[str, Any]], title: str) -> Table:
    """One line a trial: what varies, status, step, loss, held-out accuracy, reason."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    names = list(dict.fromkeys(name for line in rows for name in line["varied"]))
    for name in ("trial", *names, "seed", "status"):
        table.add_column(name)
    for name in ("step", "loss", "accuracy"):
        table.add_column(name, justify="right")
    table.add_column("reason", overflow="fold")
    for line in rows:
        seen = line["progress"]
        step = "" if seen["step"] is None else f"{seen['step']}/{seen['steps'] or '?'}"
        table.add_row(
            line["id"][:8],
            *(line["varied"].get(name, "") for name in names),
            str(line["seed"]),
            Text(line["status"], _STYLES[line["status"]]),
            step,
            "" if seen["loss"] is None else f"{seen['loss']:.4f}",
            "" if seen["accuracy"] is None else f"{seen['accuracy']:.3f}",
            line["reason"] or "",
        )
    return table


def ranking_table(facts: dict[str, Any]) -> Table:
    """Settings from best to worst, with intervals and what can be said against the best."""
    objective, level = facts["objectives"][0], f"{100 * facts['confidence']:g} %"
    table = Table(title=f"Ranking by {objective}", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("", justify="right")
    for name in facts["varies"]:
        table.add_column(name)
    for name in ("seeds", objective, f"{level} interval", "best minus this"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for place, entry in enumerate(facts["ranking"], 1):
        bounds = entry["interval"]
        table.add_row(
            str(place),
            *(entry["varied"].get(name, "") for name in facts["varies"]),
            str(len(entry["seeds"])),
            f"{entry['value']:.4g}",
            "" if bounds is None else f"{bounds[0]:.3g} to {bounds[1]:.3g}",
            behind(entry),
            verdict(place, entry),
        )
    return table


def behind(entry: dict[str, Any]) -> str:
    """How much the best is ahead of a setting, with the interval."""
    bounds = entry["behind_interval"]
    if bounds is None:
        return ""
    # An interval of no width would look like certainty; that no pair differs is all that was seen.
    if not any(bounds):
        return "no pair differs"
    return f"{entry['behind']:+.3g} ({bounds[0]:+.3g} to {bounds[1]:+.3g})"


def verdict(place: int, entry: dict[str, Any]) -> str:
    if place == 1:
        return "best"
    return "behind" if entry["distinguishable"] else "not distinguishable"

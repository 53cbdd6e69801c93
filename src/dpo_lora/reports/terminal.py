"""Evaluations and comparisons as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo_lora.evaluation.diagnosis import Finding


def show_scores(console: Console, name: str, found: dict[str, Any], longer: dict[str, Any], level: str) -> None:
    """The figures of one evaluation, its baselines and its groups."""
    table = _table(name, "", "", f"{level} interval")
    table.add_row("accuracy", f"{found['accuracy']:.4f}", _interval(found["accuracy_interval"]))
    table.add_row("  bootstrap by prompt", "", _interval(found["accuracy_bootstrap"]))
    table.add_row(
        "  length-controlled",
        _number(found["accuracy_length_controlled"]),
        _interval(found["accuracy_length_controlled_bootstrap"]),
    )
    table.add_row("always the longer answer", f"{longer['longer_wins']:.4f}", _interval(longer["longer_wins_interval"]))
    table.add_row("margin", f"{found['margin']:+.4f}", _interval(found["margin_interval"]))
    table.add_row("reward of preferred / other", f"{found['reward_chosen']:+.4f} / {found['reward_rejected']:+.4f}", "")
    table.add_row("loss", f"{found['loss']:.4f}", "")
    table.add_row("calibration error", f"{found['calibration_error']:.4f}", "")
    for group in [*found["by_topic"], *found["by_length"]]:
        label = f"{escape(group['name'])} ({group['pairs']})"
        table.add_row(label, f"{group['accuracy']:.4f}", _interval(group["accuracy_interval"]))
    console.print(table)
    console.print(f"{found['pairs']} pairs of {found['prompts']} prompts, {found['ties']} ties")


def show_comparison(console: Console, first: str, second: str, found: dict[str, Any]) -> None:
    """One comparison, ending in a plain sentence."""
    level = f"{100 * found['confidence']:.3g} %"
    table = _table(f"{second} against {first}", "", "", f"{level} interval")
    table.add_row("accuracy of the first", f"{found['accuracy_first']:.4f}", "")
    table.add_row("accuracy of the second", f"{found['accuracy_second']:.4f}", "")
    decided = found["second_ahead"] + found["first_ahead"]
    # Resampled, pairs that are all alike give an interval of no width, which would look like certainty.
    interval = _interval(found["difference_interval"]) if decided else "no pair differs"
    table.add_row("difference", f"{found['difference']:+.4f}", interval)
    table.add_row(
        "margin, nats", f"{found['margin_difference_nats']:+.4f}", _interval(found["margin_difference_nats_interval"])
    )
    table.add_row("pairs only the second / first wins", f"{found['second_ahead']} / {found['first_ahead']}", "")
    table.add_row("McNemar, exact p", f"{found['mcnemar_p']:.4g}", "")
    for topic in found["by_topic"]:
        label = f"  {escape(topic['name'])} ({topic['pairs']})"
        table.add_row(label, f"{topic['second_ahead']} / {topic['first_ahead']}", "")
    console.print(table)
    console.print(verdict(found))


def verdict(found: dict[str, Any]) -> str:
    """The comparison in plain sentences."""
    pairs = found["pairs"]
    if found["distinguishable"]:
        better = "second" if found["difference"] > 0 else "first"
        return f"The {better} is better on these {pairs} pairs, beyond chance."
    if not found["second_ahead"] + found["first_ahead"]:
        # No difference seen in n pairs: what a share has to stay below for that to be usual (the "rule of three").
        unseen = 1 - (1 - found["confidence"]) ** (1 / pairs)
        said = (
            f"Both decide each of the {pairs} pairs alike: they cannot be told apart. That many pairs leave room for "
            f"others, up to {unseen:.1%} of all, on which the two differ."
        )
    elif found["pairs_needed"] is None:
        said = f"No difference on {pairs} pairs: they cannot be told apart."
    else:
        said = (
            f"{pairs} pairs cannot tell them apart. If the difference of {found['difference']:+.4f} is the truth, "
            f"about {found['pairs_needed']} pairs tell it four times in five."
        )
    low, high = found["margin_difference_nats_interval"]
    if not low <= 0 <= high:
        said += " Their margins do differ beyond chance; a larger margin alone is no better answer."
    return said


def show_settings(console: Console, runs: list[str], rows: dict[str, list[str]]) -> None:
    """The settings on which runs differ."""
    if not rows:
        console.print("The runs have the same settings.")
        return
    table = _table("Settings that differ", "", *map(escape, runs))
    for name, values in rows.items():
        table.add_row(name, *map(escape, values))
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left", show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _interval(bounds: list[float | None]) -> str:
    low, high = bounds
    return "" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def show_verdicts(console: Console, names: list[str], found: dict[str, Any]) -> None:
    """A judge's win rate, ending with what it could not judge."""
    sides = (f"{names[0]}: trained", "its reference") if len(names) == 1 else (names[1], names[0])
    if found["win_rate"] is None:
        console.print("No prompt has a verdict in both orders; ask again later: what was answered is kept.")
        return
    low, high = found["win_rate_interval"]
    console.print(
        f"{escape(sides[0])} wins {found['win_rate']:.3f} ({low:.3f} to {high:.3f}) against {escape(sides[1])} on "
        f"{found['prompts']} prompts; {_number(found['win_rate_length_controlled'])} with length controlled"
        + ("." if found["consistent"] is None else f"; the same winner in both orders on {found['consistent']:.0%}.")
    )
    if found["without_verdict"]:
        console.print(f"{found['without_verdict']} questions have no verdict; the same command asks those again.")


def show_regression(console: Console, name: str, found: dict[str, Any]) -> None:
    """Base against adapter, task by task, ending in a plain sentence."""
    level = f"{100 * found['confidence']:.3g} %"
    table = _table(f"{name}: base against adapter", "", "documents", "base", "adapter", "gain", f"{level} together")
    for row in found["rows"]:
        paired = row["paired"]
        table.add_row(
            escape(f"{row['task']} {row['figure']}" + ("" if row["filter"] == "none" else f" ({row['filter']})")),
            str(row["documents"]),
            *(_with_error(row[side], row[f"{side}_error"]) for side in ("base", "adapter")),
            "" if paired is None else f"{paired['difference']:+.4f}",
            "" if paired is None else _interval(paired["difference_interval"]),
        )
    console.print(table)
    console.print(regression_verdict(found["rows"]))


def regression_verdict(rows: list[dict[str, Any]]) -> str:
    """The regression in a sentence; a gain below 0 is a loss whichever way the figure points."""
    clear = [row for row in rows if row["paired"] is not None and row["paired"]["distinguishable"]]
    worse = [row["task"] for row in clear if row["paired"]["difference"] < 0]
    better = [row["task"] for row in clear if row["paired"]["difference"] > 0]
    said = f"Worse beyond chance: {', '.join(dict.fromkeys(worse))}." if worse else "No task is worse beyond chance."
    if better:
        said += f" Better beyond chance: {', '.join(dict.fromkeys(better))}."
    if not worse:
        widest = max((-row["paired"]["difference_interval"][0] for row in rows if row["paired"]), default=None)
        said += "" if widest is None else f" A loss of up to {max(widest, 0):.3f} could have gone unseen."
    return said


def show_findings(console: Console, findings: list[Finding]) -> None:
    """What the numbers say, each finding with its evidence."""
    for finding in findings:
        colour = "yellow" if finding.level == "warning" else "cyan"
        console.print(f"[{colour}]{finding.level}[/{colour}]: {escape(finding.says)}", highlight=False)
        console.print(f"  {finding.evidence}", style="dim", markup=False, highlight=False)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"

"""What a sweep would do, said before anything starts: trials, what they share, time, memory, and whether it can tell.

Time and memory of one trial come from finished runs of the same base model in the outputs folder;
without one, the plan says so and guesses nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

from rich.console import Console

from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED, RunDir
from dpo_lora.schema import Retry
from dpo_lora.sweeps import shared, table
from dpo_lora.sweeps.placement import Slot
from dpo_lora.sweeps.trial import PRUNED, Trial

# Power of the comparison whose size the plan names: the usual 0.8.
_POWER = 0.8


@dataclass(frozen=True)
class Cost:
    """One trial's, scaled from ``runs`` earlier ones."""

    seconds: float
    memory_bytes: float
    runs: int


def show(
    trials: list[Trial], expected: int, begun: list[Trial], slots: list[Slot], outputs: Path, sweep: Path | None
) -> None:
    """Print the plan to stdout.

    Args:
        trials: those that are known now; a study knows only its first.
        expected: trials in all.
        begun: those of them that may lie in ``sweep``.
        sweep: the directory that would be gone on with; None for a new one.
    """
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    counts = Counter(trial.status(live=False) for trial in begun)
    retries = bool(trials) and trials[0].settings["sweep"]["retry"] == Retry.failed.value
    left = max(0, expected - sum(counts[status] for status in (FINISHED, PRUNED, *([] if retries else [FAILED]))))
    say(f"Trials: {expected}{_shape(trials, expected)}; {_standing(counts, left, retries=retries)}")
    say(f"Directory: {'a new one in ' + str(outputs) if sweep is None else sweep}")
    threads = f"{_many(slots[0].threads, 'CPU thread')} each"
    where = ", ".join(f"GPU {s.gpu}" for s in slots if s.gpu is not None) or threads
    say(f"At a time: {len(slots)} ({where})")
    keys = {shared.key(t.settings): t for t in trials}
    each = "" if len(keys) < 2 else f", for each of {len(keys)} combinations of model and data"
    say(f"Shared, done once: base model, pairs and reference log-probabilities{each}")
    cost = _cost(trials[0], outputs) if trials else None
    if cost is None:
        say("Time and memory: unknown; no finished run here has this base model. One trial alone will tell.")
    else:
        say(
            f"One trial: about {table.duration(cost.seconds)}, {cost.memory_bytes / 2**30:.1f} GiB "
            f"(from {_many(cost.runs, 'finished run')} of this base model)"
        )
        rounds, memory = -(-left // len(slots)), len(slots) * cost.memory_bytes / 2**30
        if left:
            say(f"What is to run: about {table.duration(rounds * cost.seconds)}, {memory:.1f} GiB")
    for line in _resolution(trials, expected, outputs):
        say(line)


def _shape(trials: list[Trial], expected: int) -> str:
    """How many settings and seeds make the trials up; nothing of those that a study has yet to choose."""
    if len(trials) < expected:
        return ", each chosen when it is due"
    settings = len({trial.setting for trial in trials})
    return "" if settings == expected else f" ({_many(settings, 'setting')}, {expected // settings} seeds each)"


def _standing(counts: Counter[str], left: int, *, retries: bool) -> str:
    """What has been done of a sweep and what is left, in words."""
    parts = [f"{counts[status]} {status}" for status in (FINISHED, PRUNED, FAILED, INTERRUPTED) if counts[status]]
    parts.append(f"{left} to run" if left else "nothing is left to run")
    alone = " (sweep.retry=failed runs the failed again)" if counts[FAILED] and not retries else ""
    return ", ".join(parts) + alone


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _cost(trial: Trial, outputs: Path) -> Cost | None:
    """Median of finished runs of the same base, scaled by training steps times pairs."""
    seconds, memory = [], []
    wanted = trial.settings["model"]
    for manifest, settings in _finished(outputs):
        if settings["model"] != wanted or settings["data"]["max_length"] != trial.settings["data"]["max_length"]:
            continue
        pairs = manifest["training"]["pairs"]
        asked = _pairs(trial.settings, manifest["data"]["train"]["pairs"])
        timings = manifest["timings"]
        rest = timings["total_seconds"] - timings["training_seconds"]
        seconds.append(rest + timings["training_seconds"] * asked / max(1, pairs))
        memory.append(manifest["training"]["peak_memory_bytes"])
    return Cost(median(seconds), median(memory), len(seconds)) if seconds else None


def _pairs(settings: dict[str, Any], available: int) -> float:
    train = settings["train"]
    if train["max_steps"] is not None:
        return float(train["max_steps"] * train["pairs_per_step"])
    kept = settings["data"]["max_pairs"]
    return float(train["epochs"] * (available if kept is None else min(available, kept)))


def _finished(outputs: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    found = []
    for file in (*outputs.glob("*/run.json"), *outputs.glob("*/*/run.json")):
        if file.parent.is_symlink() or file.parent.parent.is_symlink():
            continue
        run = RunDir(file.parent)
        manifest = run.manifest()
        if manifest["status"] == FINISHED:
            found.append((manifest, run.settings()))
    return found


def _resolution(trials: list[Trial], expected: int, outputs: Path) -> list[str]:
    """Whether the held-out set can tell the settings apart: the smallest difference in accuracy it would see."""
    if not trials:
        return []
    settings = trials[0].settings
    pairs = _heldout(settings, outputs)
    if pairs is None:
        return ["Held-out pairs: unknown until a run has read this data."]
    compared = max(1, expected // settings["sweep"]["repeats"] - 1)
    smallest = smallest_difference(pairs, compared, settings["eval"]["confidence"])
    lines = [
        f"Held-out pairs: {pairs}. Best against {compared} others, paired: differences in accuracy from about "
        f"{smallest:.3f} would be seen 8 times in 10."
    ]
    if smallest > 0.1:
        lines.append(
            "That is coarse: settings that differ less will come out as not distinguishable. More held-out "
            "pairs, fewer settings, or sweep.repeats make it finer."
        )
    return lines


def smallest_difference(pairs: int, comparisons: int, confidence: float) -> float:
    """The difference in accuracy that a paired comparison sees with power 0.8.

    Taken for a quarter of pairs on which two settings disagree, as settings of one sweep often do; a
    standard deviation of one half a pair.
    """
    normal = NormalDist()
    z = normal.inv_cdf(1 - (1 - confidence) / comparisons / 2) + normal.inv_cdf(_POWER)
    return z * 0.5 / pairs**0.5


def _heldout(settings: dict[str, Any], outputs: Path) -> int | None:
    """Held-out pairs of this data as an earlier run counted them, or as the cap says."""
    names = ("source", "path", "revision", "split", "heldout_path", "heldout_split", "heldout_share", "max_heldout")
    for manifest, known in _finished(outputs):
        if all(known["data"][name] == settings["data"][name] for name in names):
            return int(manifest["data"]["heldout"]["pairs"])
    cap = settings["data"]["max_heldout"]
    return None if cap is None else int(cap)

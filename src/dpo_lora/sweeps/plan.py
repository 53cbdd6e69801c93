"""What a sweep would do, said before anything starts: trials, what they share, time, memory, and whether it can tell.

Time and memory of one trial come from finished runs of the same base model in the outputs folder, and
the number of its pairs from one that read the same data; without them, the plan says so and guesses nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

from rich.console import Console

from dpo_lora.choices import Device, Retry
from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED, RunDir
from dpo_lora.sweeps import placement, shared, table
from dpo_lora.sweeps.sweep import Sweep
from dpo_lora.sweeps.trial import PRUNED, Trial, distinct, read_all

# Power of the comparison whose size the plan names: the usual 0.8.
_POWER = 0.8


@dataclass(frozen=True)
class Cost:
    """One trial's, scaled from ``runs`` earlier ones."""

    seconds: float | None  # None where the number of its pairs is not known
    seconds_per_pair: float  # of training
    memory_bytes: float
    runs: int


def show(sweep: Sweep, jobs: Sequence[Sequence[str]], settings: int | None = None) -> None:
    """Print to stdout what ``sweep`` would do.

    Args:
        jobs: overrides of its settings.
        settings: how many there are in all, where ``jobs`` only stands for them; None: ``jobs`` are all.
    """
    trials = distinct([sweep.compose(overrides) for overrides in jobs])
    expected = len(trials) if settings is None else settings * sweep.settings.repeats
    begun = trials if settings is None else read_all(sweep.directory.path)
    room = placement.slots(sweep.settings, Device(sweep.config.train.device), expected)
    known = sweep.directory.path if sweep.directory.summary_file.exists() else None
    _print(trials, expected, begun, room, Path(sweep.config.outputs), known)


def _print(
    trials: list[Trial],
    expected: int,
    begun: list[Trial],
    slots: list[placement.Slot],
    outputs: Path,
    sweep: Path | None,
) -> None:
    """The plan, line by line.

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
    for line in _costs(_cost(trials[0], outputs) if trials else None, left, len(slots)):
        say(line)
    for line in _resolution(trials, expected, outputs):
        say(line)


def _costs(cost: Cost | None, left: int, places: int) -> list[str]:
    """What one trial takes, and all of those that are ``left``, ``places`` at a time."""
    if cost is None:
        return ["Time and memory: unknown; no finished run here has this base model. One trial alone will tell."]
    memory, source = cost.memory_bytes / 2**30, f"from {_many(cost.runs, 'finished run')} of this base model"
    if cost.seconds is None:
        return [
            f"One trial: about {table.duration(1000 * cost.seconds_per_pair)} for every 1,000 training pairs, "
            f"{memory:.1f} GiB ({source}). How many pairs this data has is unknown until a run has read it."
        ]
    lines = [f"One trial: about {table.duration(cost.seconds)}, {memory:.1f} GiB ({source})"]
    if left:
        total = table.duration(-(-left // places) * cost.seconds)
        lines.append(f"What is to run: about {total}, {places * memory:.1f} GiB")
    return lines


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
    rests, rates, memory = [], [], []
    wanted, known = trial.settings["model"], _finished(outputs)
    for manifest, settings in known:
        if settings["model"] != wanted or settings["data"]["max_length"] != trial.settings["data"]["max_length"]:
            continue
        timings = manifest["timings"]
        rests.append(timings["total_seconds"] - timings["training_seconds"])
        rates.append(timings["training_seconds"] / max(1, manifest["training"]["pairs"]))
        memory.append(manifest["training"]["peak_memory_bytes"])
    if not rates:
        return None
    pairs = _pairs(trial.settings, known)
    seconds = None if pairs is None else median(r + rate * pairs for r, rate in zip(rests, rates, strict=True))
    return Cost(seconds, median(rates), median(memory), len(rates))


def _pairs(settings: dict[str, Any], known: list[tuple[dict[str, Any], dict[str, Any]]]) -> float | None:
    """Pairs that a run trains on, counted as often as it does; None where that depends on data nobody has read yet."""
    train, kept = settings["train"], settings["data"]["max_pairs"]
    if train["max_steps"] is not None:
        return float(train["max_steps"] * train["pairs_per_step"])
    for manifest, earlier in known:
        if _source(earlier["data"]) != _source(settings["data"]):
            continue
        found, cap = manifest["data"]["train"]["pairs"], earlier["data"]["max_pairs"]
        if kept is not None and kept <= found:
            return float(train["epochs"] * kept)
        if cap is None or found < cap:  # it has seen them all
            return float(train["epochs"] * found)
    return None


def _source(data: dict[str, Any]) -> dict[str, Any]:
    """What decides which pairs there are, before some are kept."""
    return {name: value for name, value in data.items() if name not in ("name", "max_pairs", "max_heldout")}


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

"""Kill -9 a sweep's parent ten times over its whole course, start it again each time; compare with an undisturbed one.

    python bench/sweeps/kill_parent.py [--kills 10] [--seed 0] [--out FILE.json] [-- OVERRIDES ...]

The moments are drawn over the sweep's work, one from each tenth of it: a kill falls due once so many steps
of all trials are in their metrics (for most kills, one since the last start; the last trials' steps are left for
the end), plus up to a quarter of a trial's length. Writes one JSON object: the moments, orphans seen two seconds
after each kill, and whether the final tables (every column but times, speeds and memory) and the adapters' bytes are
equal. Without overrides it is six short trials of the embedded model, some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from bench.record import write  # noqa: E402

SHORT = [
    "experiment=smoke", "train=cpu", "train.max_steps=6", "train.save_every=2", "tracking=none", "eval.samples=0",
    "dpo.beta=0.05,0.1,0.2", "lora.r=8,16",
]  # fmt: skip
_TRAINING = 0.8  # share of the kills that wait for a step; the others may fall into start-up
NOISY = {"tokens_per_second", "peak_memory_bytes", "seconds", "reason"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "sweep_kill_parent.json")
    parser.add_argument("overrides", nargs="*", default=SHORT)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        calm, rough = Path(scratch, "calm"), Path(scratch, "rough")
        subprocess.run(_command(options.overrides, calm), check=True, stdout=subprocess.DEVNULL)
        work = _steps(calm)
        last = work - work / len(_table(calm))  # from here on the sweep may be through before a kill falls due
        usual = statistics.median(json.loads(f.read_text())["seconds"] for f in calm.glob("*/*/outcome.json"))
        kills = []
        for number in range(options.kills):
            due = min(work * (number + chance.random()) / options.kills, last)
            if chance.random() < _TRAINING:
                due = max(due, _steps(rough) + 1)  # not before some trial trains again
            process = subprocess.Popen(_command(options.overrides, rough), stdout=subprocess.DEVNULL)
            begun, before = time.monotonic(), _steps(rough)
            while _steps(rough) < due and process.poll() is None:
                time.sleep(0.02)
            time.sleep(chance.uniform(0.0, usual / 4))
            if process.poll() is not None:
                break  # through; it was killed as often as it could be
            steps = {"due_at_step": round(due, 1), "steps_before": before, "steps_done": _steps(rough)}
            seen = {**steps, "trials_done": _finished(rough)}
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(2)
            kills.append({**seen, "seconds": round(time.monotonic() - begun, 1), "orphans": _orphans(process.pid)})
            print(kills[-1], file=sys.stderr, flush=True)
        subprocess.run(_command(options.overrides, rough), check=True, stdout=subprocess.DEVNULL)
        found = {
            "overrides": options.overrides,
            "kills": kills,
            "steps_in_all": work,
            "orphans": sum(len(k["orphans"]) for k in kills),
            "sweeps": len(list(rough.glob("*/sweep.json"))),
            "tables_equal": _table(calm) == _table(rough),
            "adapters_equal": _adapters(calm) == _adapters(rough),
            "rows": len(_table(rough)),
        }
        write(options.out, "cpu", found)


def _steps(outputs: Path) -> int:
    """Optimizer steps in the metrics of all trials."""
    files = [f for f in outputs.glob("*/*/metrics.jsonl") if not f.parent.is_symlink()]
    return sum('"loss"' in line for f in files for line in f.read_text().splitlines())


def _command(overrides: list[str], outputs: Path) -> list[str]:
    return [sys.executable, "-m", "dpo_lora", "train", "-m", *overrides, f"outputs={outputs}"]


def _finished(outputs: Path) -> int:
    return sum(
        '"status": "finished"' in f.read_text() for f in outputs.glob("*/*/run.json") if not f.parent.is_symlink()
    )


def _orphans(parent: int) -> list[int]:
    """Processes of the fork server that this parent had started."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "dpo_lora.sweeps.forkserver" in words and words[-1] == str(parent):
            found.append(process.pid)
    return found


def _table(outputs: Path) -> list[tuple[tuple[str, str], ...]]:
    (file,) = outputs.glob("*/trials.csv")
    with file.open() as stream:
        rows = [{k: v for k, v in row.items() if k not in NOISY} for row in csv.DictReader(stream)]
    return sorted(tuple(sorted(row.items())) for row in rows)


def _adapters(outputs: Path) -> dict[str, str]:
    files = [f for f in outputs.glob("*/*/adapter_model.safetensors") if not f.parent.is_symlink()]
    return {f.parent.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


if __name__ == "__main__":
    main()

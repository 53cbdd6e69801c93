"""Kill -9 a sweep's parent at random moments until it gets through; compare with an undisturbed sweep.

    python bench/sweeps/kill_parent.py --kills 10 --seed 0 -- OVERRIDES ...

Prints one JSON object: the moments, orphans seen two seconds after each kill, and whether the final
tables (every column but times, speeds and memory) and the adapters' bytes are equal.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

NOISY = {"tokens_per_second", "peak_memory_bytes", "seconds", "reason"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", type=float, help="Draw moments from this many seconds after a trial has begun.")
    parser.add_argument("overrides", nargs="+")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        calm, begun = Path(scratch, "calm"), time.monotonic()
        subprocess.run(_command(options.overrides, calm), check=True, stdout=subprocess.DEVNULL)
        usual = time.monotonic() - begun
        rough, kills = Path(scratch, "rough"), []
        while len(kills) < options.kills:
            process = subprocess.Popen(_command(options.overrides, rough), stdout=subprocess.DEVNULL)
            if options.training:
                _wait_for_training(process, rough)
            moment = chance.uniform(0.0, options.training or usual)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                time.sleep(2)
                kills.append({"after": round(moment, 2), "done": _finished(rough), "orphans": _orphans(process.pid)})
                print(kills[-1], file=sys.stderr, flush=True)
            else:
                if list(rough.glob("*/sweep.json")) and _finished(rough):
                    rough = Path(scratch, f"rough-{len(kills)}")  # got through: go on killing a fresh one
        subprocess.run(_command(options.overrides, rough), check=True, stdout=subprocess.DEVNULL)
        print(
            json.dumps(
                {
                    "kills": kills,
                    "orphans": sum(len(k["orphans"]) for k in kills),
                    "sweeps": len(list(rough.glob("*/sweep.json"))),
                    "tables_equal": _table(calm) == _table(rough),
                    "adapters_equal": _adapters(calm) == _adapters(rough),
                    "rows": len(_table(rough)),
                }
            )
        )


def _command(overrides: list[str], outputs: Path) -> list[str]:
    return [sys.executable, "-m", "dpo_lora", "train", "-m", *overrides, f"outputs={outputs}"]


def _wait_for_training(process: subprocess.Popen[bytes], outputs: Path) -> None:
    begun = time.time()
    while process.poll() is None:
        if any(f.stat().st_mtime > begun for f in outputs.glob("*/*/run.json")):
            return
        time.sleep(0.05)


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

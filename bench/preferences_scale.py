"""How memory and time of the preferences room go with the number of pairs.

    python bench/preferences_scale.py 100000 1000000 [--model NAME_OR_FOLDER] [--folder SCRATCH]

For each number: synthetic pairs are written, then two fresh processes take them from the file to the
first step's batch, the first with an empty cache. Printed are rows a second, seconds to the batch,
the main process' peak resident memory, and the peak of all processes together (PSS: pages that are
shared count once).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "l", "ck", "mp")]


def write(path: Path, count: int) -> None:
    """Pairs of 5 to 15 words a text, no two alike; one in 1,000 has an empty side, one in 500 comes twice."""
    made = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(made.choices(WORDS, k=made.randint(least, most)))

    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            chosen = text(5, 15) if n % 1000 else ""
            row = {
                "prompt": [{"role": "user", "content": f"{text(6, 12)} {n}?"}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": text(5, 15)}],
            }
            line = json.dumps(row) + "\n"
            file.write(line)
            if n % 500 == 0:
                file.write(line)  # a duplicate


class Peak(threading.Thread):
    """Peak PSS of this process and its children, in bytes, looked at four times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.anonymous, self.ended = 0, 0, threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.ended.wait(0.25):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)


def one(file: Path, model: str) -> None:
    """From the file to the first batch, in this process."""
    begun = time.monotonic()
    peak = Peak()
    peak.start()
    from transformers import AutoTokenizer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from dpo_lora import composition
    from dpo_lora.preferences import pairs

    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = composition.compose(["data=local", f"data.path={file}"])
    imported = time.monotonic()
    loaded = pairs.load(settings.data, tokenizer, settings.seed)
    rows = [loaded.train[i] for i in random.Random(0).sample(range(len(loaded.train)), 16)]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    seconds = time.monotonic() - imported
    peak.ended.set()
    peak.join()
    print(
        json.dumps(
            {
                "pairs": len(loaded.train) + len(loaded.heldout),
                "batch": list(batch["input_ids"].shape),
                "imports_seconds": round(imported - begun, 1),
                "seconds": round(seconds, 1),
                "rows_per_second": round((len(loaded.train) + len(loaded.heldout)) / seconds),
                "main_peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
                "worker_peak_rss_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1000,
                "all_peak_pss_mb": peak.bytes // 1_000_000,
                "findings": loaded.facts["lint"]["findings"],
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("counts", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one, arguments.model)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        for count in arguments.counts:
            file = Path(scratch) / f"{count}.jsonl"
            write(file, count)
            print(f"{count} pairs, {file.stat().st_size >> 20} MiB", flush=True)
            for start in ("first", "second"):
                command = [sys.executable, __file__, "--one", str(file), "--model", arguments.model]
                environment = {**os.environ, "DPO_LORA_CACHE": f"{scratch}/cache-{count}"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
                print(f"  {start} start: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()

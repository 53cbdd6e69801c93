"""How memory and time of the preferences room go with the number of pairs.

    python bench/preferences_scale.py 100000 1000000 --model FOLDER [--folder SCRATCH] [--starts first second train]

For each number synthetic pairs are written, then fresh processes take them:

- first: from the file to the first step's batch, with an empty cache;
- second: the same with what the first has left;
- train: two optimizer steps of a tiny random model on all of them, by the command line.

Printed, and written with --json: pairs a second, seconds to the batch, and the memory of the whole process tree,
looked at four times a second: the peak of the sum of PSS (pages that processes share count once) and of RSS (they
count once for each process). A named --folder is kept, so that starts can be measured one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

SIDES = ("chosen_ids", "rejected_ids")
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
    """Peak memory of a process and its children, in bytes: all of it by PSS and by RSS, and their own by PSS.

    Their own is what is not a mapped file: pages of a file the kernel takes back when it needs them.
    """

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process, self.pss, self.rss, self.own, self.ended = process, 0, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.25):
            pss, rss, own = 0, 0, 0
            try:
                family = [self.process, *self.process.children(recursive=True)]
            except psutil.Error:
                continue
            for process in family:
                try:
                    memory = process.memory_full_info()
                except psutil.Error:
                    continue
                pss, rss, own = pss + memory.pss, rss + memory.rss, own + anonymous(process.pid)
            self.pss, self.rss, self.own = max(self.pss, pss), max(self.rss, rss), max(self.own, own)


def anonymous(pid: int) -> int:
    """Bytes of a process that no file stands behind, shared ones divided by who shares them; Linux alone tells."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))


def one(file: Path, model: str) -> None:
    """From the file to the first step's batch, in this process, which imports what that takes: no PEFT and no TRL."""
    begun = psutil.Process().create_time()
    from transformers import AutoTokenizer

    from dpo_lora import composition
    from dpo_lora.engine.packing import plan_pairs
    from dpo_lora.preferences import pairs

    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = composition.compose(["data=local", f"data.path={file}"])
    imported = time.time()
    loaded = pairs.load(settings.data, tokenizer, settings.seed)
    rows = [loaded.train[i] for i in random.Random(0).sample(range(len(loaded.train)), 16)]
    sides = [[(row["prompt_ids"] + row[side], len(row["prompt_ids"])) for side in SIDES] for row in rows]
    batch = plan_pairs(sides)
    seconds = time.time() - imported
    used = len(loaded.train) + len(loaded.heldout)
    print(
        json.dumps(
            {
                "pairs": used,
                "batch_tokens": batch.tokens,
                "imports_seconds": round(imported - begun, 1),
                "seconds": round(seconds, 1),
                "pairs_per_second": round(used / seconds),
                "findings": loaded.facts["lint"]["findings"],
            }
        )
    )


def tiny(folder: Path, model: str) -> Path:
    """A random model of some thousand weights a layer, with the tokenizer of ``model``."""
    made = folder / "tiny"
    if not made.is_dir():
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(model)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        special = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special)).save_pretrained(made)
        tokenizer.save_pretrained(made)
    return made


def command(start: str, file: Path, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The command line of one fresh process."""
    if start != "train":
        return [sys.executable, __file__, "--one", str(file), "--model", arguments.model]
    model = tiny(folder, arguments.model)
    overrides = ["model=hub", f"model.name={model}", "data=local", f"data.path={file}", "data.max_heldout=64"]
    overrides += ["train=cpu", "train.max_steps=2", "tracking=none", "eval.samples=0", f"outputs={folder / 'outputs'}"]
    cache = f"train.reference_cache={str(arguments.reference_cache).lower()}"
    return [sys.executable, "-m", "dpo_lora", "train", *overrides, cache]


def measured(words: list[str], cache: Path) -> dict[str, Any]:
    """What one fresh process says of itself, and its memory."""
    begun = time.monotonic()
    environment = {**os.environ, "DPO_LORA_CACHE": str(cache)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        peak = Peak(psutil.Process(process.pid))
        peak.start()
        out, err = process.communicate()
        peak.ended.set()
        peak.join()
    if process.returncode:
        raise SystemExit(err)
    told = json.loads(out) if "--one" in words else {"run_seconds": round(time.monotonic() - begun, 1)}
    peaks = {"peak_pss_mb": peak.pss, "peak_rss_mb": peak.rss, "peak_own_mb": peak.own}
    return told | {name: found // 1_000_000 for name, found in peaks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("counts", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--model", required=True, help="whose tokenizer: a name or a folder")
    parser.add_argument("--folder", type=Path, help="scratch folder, kept; none: a temporary one")
    parser.add_argument("--starts", nargs="+", choices=["first", "second", "train"], default=["first", "second"])
    parser.add_argument(
        "--reference-cache", action="store_true", help="train: with the reference's pass over all pairs"
    )
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one, arguments.model)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for count in arguments.counts:
            file, cache = folder / f"{count}.jsonl", folder / f"cache-{count}"
            if not file.is_file():
                write(file, count)
            print(f"{count} pairs, {file.stat().st_size >> 20} MiB", flush=True)
            for start in arguments.starts:
                if start == "first":
                    shutil.rmtree(cache, ignore_errors=True)
                found = measured(command(start, file, folder, arguments), cache)
                print(f"  {start}: {json.dumps(found)}", flush=True)
                if arguments.json:
                    keep(arguments.json, count, start, found)


def keep(path: Path, count: int, start: str, found: dict[str, Any]) -> None:
    """Put one start's figures into the results file."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    results["machine"] = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    results.setdefault(str(count), {})[start] = found
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""A step of decoding sampled answers of policy and reference: the engine's layers beside transformers with PEFT.

    python bench/decoding.py [--rows 8] [--steps 24] [--rounds 3]

A random model of SmolLM2-135M's shape with a LoRA adapter (all linear layers, r=16) continues --rows prompts of 45
tokens under the adapter and under none, in one batch, both ways in turn. Prints the median milliseconds of a step, and
how long reading the weights once takes: a product of every weight with one row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "src")]

from bench.record import write  # noqa: E402
from bench.workloads import SHAPES  # noqa: E402

PROMPT = 45  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decoding.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = dict(SHAPES["smollm2-135m"])
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    seconds: dict[str, list[float]] = {"transformers": [], "engine": [], "weights": []}
    for _ in range(args.rounds):
        for way in ("transformers", "engine"):
            seconds[way].append(decode(model, way == "engine", args.rows, args.steps))
        seconds["weights"].append(read_weights(base))
    found = {f"{way}_ms_a_step": round(1e3 * statistics.median(values), 1) for way, values in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(seconds["transformers"], seconds["engine"], strict=True))
    found |= {"rows": 2 * args.rows, "times_as_fast": round(ratio, 2), "seconds": seconds}
    for name, value in found.items():
        if name != "seconds":
            print(f"{name}: {value}")
    write(args.out, "cpu", found)


def decode(model: torch.nn.Module, by_engine: bool, rows: int, steps: int) -> float:
    """Seconds a token, the prompt's pass included in none."""
    from dpo_lora.evaluation.decoding import continuations

    prompts = torch.randint(5, 40000, (rows, PROMPT)).tolist()
    options = {"sampled": [False] * rows, "seed": 0, "ends": set(), "pad": 0, "adapters": ("default", "__base__")}

    def took(tokens: int) -> float:
        begun = time.perf_counter()
        continuations(model, prompts, max_new_tokens=tokens, by_engine=by_engine, **options)
        return time.perf_counter() - begun

    first = took(1)
    return (took(steps + 1) - first) / steps


@torch.no_grad()
def read_weights(base: torch.nn.Module) -> float:
    """Seconds to meet every weight of a step once."""
    weights = [p for name, p in base.named_parameters() if p.dim() == 2 and "embed" not in name]
    weights.append(base.get_output_embeddings().weight)
    inputs = {w.shape[1]: torch.randn(1, w.shape[1]) for w in weights}
    begun = time.perf_counter()
    for weight in weights:
        torch.mm(inputs[weight.shape[1]], weight.t())
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()

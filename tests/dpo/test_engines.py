"""The packed engine and the reference cache under the real command line: faster, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_lora import lora
from dpo_lora.dpo.engines import _beginning
from dpo_lora.engine import lanes
from dpo_lora.engine.native import library
from dpo_lora.files import read_jsonl
from dpo_lora.rundir import FAILED, FINISHED, RunDir
from harness import CommandLine, dpo_lora, make_pair

FAST = ["train.learning_rate=1e-2"]


@pytest.fixture(params=["narrow", "wide"])
def words_of_width(request: pytest.FixtureRequest, tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    """On the tiny model, and on one whose heads fill the vectors of any processor, which C++ computes."""
    if request.param == "narrow":
        return tiny_overrides
    from transformers import AutoConfig, LlamaForCausalLM

    name = next(word for word in tiny_overrides if word.startswith("model.name="))
    folder = shutil.copytree(name.partition("=")[2], tmp_path / "wide")
    torch.manual_seed(0)
    LlamaForCausalLM(AutoConfig.from_pretrained(folder, head_dim=32)).save_pretrained(folder)
    return [*(word for word in tiny_overrides if word != name), f"model.name={folder}"]


def own_kernels(words: list[str]) -> set[str]:
    """What the attention of the written-out layers may be called here; narrow heads fill vectors of some processors."""
    if any(word.endswith("/wide") for word in words):
        return {"flash" if library.loaded() is None else "native"}
    return {"flash", "native"}


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def assert_close(a: Path, b: Path) -> None:
    left, right = adapter(a), adapter(b)
    for name, weight in left.items():
        torch.testing.assert_close(right[name], weight, rtol=1e-3, atol=2e-5)


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = adapter(a), adapter(b)
    assert left
    assert all(torch.equal(left[name], right[name]) for name in left)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(run / "metrics.jsonl") if "loss" in row]


def test_packed_and_stock_train_the_same_adapter(cli: CommandLine, words_of_width: list[str]) -> None:
    packed = cli("train", *words_of_width, *FAST, "train.engine=packed").run
    stock = cli("train", *words_of_width, *FAST, "train.engine=stock").run
    facts = RunDir(packed).manifest()["engine"]
    assert facts["engine"] == "packed"
    assert facts["attention"] in own_kernels(words_of_width)
    assert facts["probe_difference"] < 2e-5
    assert RunDir(stock).manifest()["engine"]["engine"] == "stock"
    assert losses(packed) == pytest.approx(losses(stock), rel=1e-4)
    assert_close(packed, stock)


def test_more_threads_than_processors_are_told(
    cli: CommandLine, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    threads = torch.get_num_threads()
    try:
        outcome = cli("train", *tiny_overrides, "train.threads=3", "train.max_steps=1")
    finally:
        torch.set_num_threads(threads)
    assert RunDir(outcome.run).manifest()["engine"]["attention"] == "flash"
    assert "3 threads and fewer processors" in outcome.err


def test_the_probe_reads_past_what_both_answers_begin_with() -> None:
    same = list(range(100))
    for chosen, rejected in (([*same, 1, 2], [*same, 3]), (same, [*same, 5]), ([*same, 5], same), ([1], [2])):
        cut = _beginning({"prompt_ids": same, "chosen_ids": chosen, "rejected_ids": rejected})
        assert cut["chosen_ids"] != cut["rejected_ids"]
        assert len(cut["prompt_ids"]) == 48
    long = _beginning({"prompt_ids": [1], "chosen_ids": [1, *same], "rejected_ids": [2, *same]})
    assert len(long["chosen_ids"]) == len(long["rejected_ids"]) == 32


def test_a_kernel_that_was_asked_for_is_used(cli: CommandLine, tiny_overrides: list[str]) -> None:
    runs = [cli("train", *tiny_overrides, *FAST, f"train.attention={name}").run for name in ("auto", "sdpa")]
    own, asked_for = (RunDir(run).manifest()["engine"]["attention"] for run in runs)
    assert own in own_kernels(tiny_overrides)
    assert asked_for == "sdpa"
    assert_close(*runs)


def test_the_cut_does_not_change_the_result(cli: CommandLine, tiny_overrides: list[str]) -> None:
    words = [w for w in tiny_overrides if not w.startswith("train.micro_batch")]
    whole = cli("train", *words, *FAST, "train.tokens_per_batch=100000").run
    for cut in ("train.tokens_per_batch=1", "train.tokens_per_batch=150", "train.micro_batch=1"):
        assert_close(whole, cli("train", *words, *FAST, cut).run)


def test_rows_side_by_side_train_the_same_adapter(
    cli: CommandLine, words_of_width: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two threads, through reference, training and scores; twice to the same bits."""
    monkeypatch.setattr(lanes, "LEAST_TOKENS", 1)
    monkeypatch.setattr(lanes, "MOST_WAITING", 2.0)
    divided = lanes.divided
    rows: list[int] = []
    monkeypatch.setattr(lanes, "divided", lambda *a: rows.append(len(found := divided(*a))) or found)
    threads = torch.get_num_threads()
    one = cli("train", *words_of_width, *FAST, "train.threads=1").run
    try:
        two, again = (
            cli("train", *words_of_width, *FAST, "train.threads=2", "train.reference_cache=false").run for _ in range(2)
        )
    finally:
        torch.set_num_threads(threads)
    assert [RunDir(run).manifest()["engine"]["lanes"] for run in (one, two)] == [1, 2]
    assert rows and set(rows) == {2}
    assert_close(one, two)
    assert_same_bits(two, again)


def test_a_second_run_asks_the_reference_nothing(cli: CommandLine, tiny_overrides: list[str]) -> None:
    """Another rank, beta and learning rate on the same data and base: every log-probability is found."""
    first = RunDir(cli("train", *tiny_overrides).run).manifest()["engine"]["reference_cache"]
    assert first["pairs_found"] == 0
    assert first["pairs_computed"] > 30
    again = cli("train", *tiny_overrides, "lora.r=4", "dpo.beta=0.3", "dpo=ipo", "seed=3", *FAST).run
    assert RunDir(again).manifest()["engine"]["reference_cache"] == {
        "pairs_found": first["pairs_computed"],
        "pairs_computed": 0,
    }


def test_a_second_run_does_not_check_the_engine_again(cli: CommandLine, tiny_overrides: list[str]) -> None:
    """Another beta and learning rate on the same bits; another rank or seed is another adapter."""
    runs = [cli("train", *tiny_overrides, *words).run for words in ((), ("dpo.beta=0.3", *FAST), ("lora.r=4",))]
    facts = [RunDir(run).manifest()["engine"] for run in runs]
    assert [fact["probe_known"] for fact in facts] == [False, True, False]
    assert facts[0]["probe_difference"] == facts[1]["probe_difference"]


def test_warm_cold_and_no_cache_give_one_result(cli: CommandLine, tiny_overrides: list[str]) -> None:
    cold = cli("train", *tiny_overrides, *FAST, "dpo.ld_alpha=0.5").run
    warm = cli("train", *tiny_overrides, *FAST, "dpo.ld_alpha=0.5").run
    off = cli("train", *tiny_overrides, *FAST, "dpo.ld_alpha=0.5", "train.reference_cache=false").run
    assert_same_bits(cold, warm)
    assert RunDir(off).manifest()["engine"]["reference_cache"] is None
    assert_close(cold, off)


def test_dropout_draws_the_same_with_a_warm_and_a_cold_cache(cli: CommandLine, tiny_overrides: list[str]) -> None:
    words = [*tiny_overrides, *FAST, "lora.dropout=0.2"]
    assert_same_bits(cli("train", *words).run, cli("train", *words).run)


@pytest.mark.parametrize(
    "words", [(), ("train.engine=stock", "dpo.ld_alpha=0.5"), ("train.micro_batch=1",), ("lora.dropout=0.2",)]
)
def test_a_policy_that_does_not_start_as_its_reference_is_not_trained(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setitem(lora.INITS, "default", False)  # PEFT then draws both factors
    run = RunDir(tmp_path / "moved")
    outcome = cli("train", *tiny_overrides, *words, f"run_dir={run}")
    assert outcome.code == 2
    assert "Before the first update the policy is not its reference" in outcome.err
    logged = read_jsonl(run.metrics_file) if run.metrics_file.exists() else []
    assert not any("loss" in row for row in logged)
    assert not run.eval_file.exists(), "nothing is said of a start that was not what it was taken for"
    assert not list(run.checkpoints.glob("checkpoint-*"))
    assert run.manifest()["status"] == FAILED


def test_what_training_draws_at_random_is_not_taken_for_a_moved_start(
    cli: CommandLine, tiny_overrides: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    """Attention dropout is drawn anew for policy and reference; it is a model's own, no setting turns it off."""
    model = tmp_path / "with-attention-dropout"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    run = RunDir(cli("train", *tiny_overrides, *FAST, f"model.name={model}").run)
    assert run.manifest()["engine"]["engine"] == "stock"
    assert run.manifest()["status"] == FINISHED


def test_a_parents_reference_is_not_the_bases(cli: CommandLine, tiny_overrides: list[str]) -> None:
    first = cli("train", *tiny_overrides, *FAST).run
    second = cli("train", *tiny_overrides, f"parent={first}").run
    facts = RunDir(second).manifest()["engine"]["reference_cache"]
    assert facts["pairs_found"] == 0
    assert facts["pairs_computed"] > 30


def test_a_broken_cache_file_is_noticed_and_built_again(
    cli: CommandLine, tiny_overrides: list[str], own_cache: Path
) -> None:
    first = cli("train", *tiny_overrides, *FAST).run
    files = list((own_cache / "reference").glob("*/*.safetensors"))
    assert files
    for file in files:
        bits = bytearray(file.read_bytes())
        bits[len(bits) // 2] ^= 1
        file.write_bytes(bits)
    outcome = cli("cache", "verify")
    assert outcome.code == 1
    assert outcome.out.count("broken, set aside: ") == len(files)
    second = cli("train", *tiny_overrides, *FAST).run
    assert RunDir(second).manifest()["engine"]["reference_cache"]["pairs_found"] == 0
    assert_same_bits(first, second)
    assert cli("cache", "verify").code == 0


def test_cache_entries_are_listed_and_removed(cli: CommandLine, tiny_overrides: list[str]) -> None:
    assert cli("train", *tiny_overrides).code == 0
    entry = cli("cache", "ls").out.split()[0]
    outcome = cli("cache", "rm", "no-such-entry")
    assert outcome.code == 2
    assert "no-such-entry" in outcome.err
    assert cli("cache", "rm", entry).code == 0
    assert cli("cache", "ls").out == ""


def test_two_runs_started_together_share_one_cache(tiny_overrides: list[str], tmp_path: Path, own_cache: Path) -> None:
    words = [sys.executable, "-m", "dpo_lora", "train", *tiny_overrides, *FAST]
    runs = [tmp_path / "a", tmp_path / "b"]
    started = [subprocess.Popen([*words, f"run_dir={run}"], stderr=subprocess.PIPE) for run in runs]
    for process in started:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    assert_same_bits(*runs)
    assert list((own_cache / "reference").rglob("*.safetensors"))
    done = dpo_lora("cache", "verify")
    assert done.returncode == 0, done.stdout


def test_a_model_that_cannot_be_packed_takes_the_stock_path_and_says_why(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path
) -> None:
    import shutil

    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    folder = tmp_path / "sliding"
    shutil.copytree(next(w for w in tiny_overrides if w.startswith("model.name=")).partition("=")[2], folder)
    config = Starcoder2Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    Starcoder2ForCausalLM(config).save_pretrained(folder)
    words = [w for w in tiny_overrides if not w.startswith("model.name=")]
    outcome = cli("train", *words, f"model.name={folder}", "eval.report=true")
    facts = RunDir(outcome.run).manifest()["engine"]
    assert facts["engine"] == "stock"
    assert (outcome.run / "report.html").is_file()
    assert "sliding window of 8" in facts["why_stock"]
    assert "sliding window of 8" in outcome.err
    refused = cli("train", *words, f"model.name={folder}", "train.engine=packed")
    assert refused.code == 2
    assert "sliding window of 8" in refused.err


def test_the_check_reads_past_a_sliding_window(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two pairs begin they are shorter than the window; only the longest pair tells whether it is there."""
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path / "sliding"
    shutil.copytree(next(w for w in tiny_overrides if w.startswith("model.name=")).partition("=")[2], folder)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=90))
    for weight in base.parameters():
        weight.data.mul_(5 if weight.dim() > 1 else 1)  # as it is made, it hardly looks back
    base.save_pretrained(folder)
    pairs = [make_pair(number) for number in range(40)]
    for pair in pairs[20:]:
        pair["chosen"] = [{"role": "assistant", "content": "It is sixty. " * 8}]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    words = [*(w for w in tiny_overrides if not w.startswith("model.name=")), f"model.name={folder}"]
    words += [f"data.path={file}", "data.heldout_share=0.1", "eval.samples=0"]
    packed = cli("train", *words, "train.engine=packed").run
    assert_close(packed, cli("train", *words, "train.engine=stock").run)

    monkeypatch.setenv("DPO_LORA_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr("dpo_lora.engine.decoder._Family.window", lambda *_: None)
    refused = cli("train", *words, "train.engine=packed")
    assert refused.code == 2
    assert "log-probabilities differ" in refused.err


@pytest.mark.parametrize("preset", ["aot", "mpo"])
def test_losses_that_look_across_pairs_train_the_same_packed_and_stock(
    cli: CommandLine, tiny_overrides: list[str], preset: str
) -> None:
    """Their steps go whole through the trainer, and mpo is three losses; of the others each pair's loss is its own,
    and tests/engine/test_forward.py compares each with TRL's."""
    words = [*tiny_overrides, f"dpo={preset}", "train.max_steps=2", "train.warmup=0", "eval.before=false", *FAST]
    packed = cli("train", *words, "train.engine=packed").run
    stock = cli("train", *words, "train.engine=stock").run
    assert losses(packed) == pytest.approx(losses(stock), rel=1e-3, abs=1e-5)

"""Steps that do not fit in memory: what is given up for them, in which order, and that the result stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_lora.dpo.relief import Relief
from dpo_lora.dpo.trainer import PairTrainer
from dpo_lora.engine import layer
from dpo_lora.files import read_jsonl
from dpo_lora.rundir import RunDir
from harness import CommandLine

FAST = ["train.learning_rate=1e-2", "train.max_steps=2", "eval.samples=0"]


def bits(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def is_checkpointing(trainer: PairTrainer) -> bool:
    packed = trainer.engine.packed
    return bool(trainer.model.get_base_model().model.gradient_checkpointing or (packed and packed.recompute))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Steps fit only where layers are computed again; what was tried: pairs, and whether they are."""
    tried: list[tuple[int, bool]] = []
    compute_loss = PairTrainer.compute_loss

    def cramped(self, model, inputs, *args, **kwargs):
        if self.model.training:
            tried.append((len(inputs["input_ids"]) // 2, is_checkpointing(self)))
            if not is_checkpointing(self):
                raise torch.OutOfMemoryError("there is no more")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "compute_loss", cramped)
    return tried


@pytest.mark.parametrize("engine", ["packed", "stock"])
def test_layers_are_computed_again_where_nothing_else_helps(
    cli: CommandLine, tiny_overrides: list[str], narrow: list[tuple[int, bool]], engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = [w for w in tiny_overrides if not w.startswith("train.micro_batch")]
    words += [*FAST, "train.pairs_per_step=4", f"train.engine={engine}"]
    again: list[bool] = []
    forward = layer._forward

    def noted(*args, for_backward=False):
        again.append(for_backward)
        return forward(*args, for_backward=for_backward)

    monkeypatch.setattr(layer, "_forward", noted)
    run = cli("train", *words).run
    first = [pairs for pairs, on in narrow if not on]
    assert (first[0], first[-1]) == (4, 1), "cut finer, for that costs less here, then computed again"
    assert first == sorted(first, reverse=True)
    assert {pairs for pairs, on in narrow if on} == {1}
    assert any(again) == (engine == "packed"), "of the written-out layers, too"
    told = RunDir(run).manifest()["training"]
    assert told["relief"] == ["gradient_checkpointing"]
    assert "did not fit in memory" in (run / "train.log").read_text()

    other = cli("train", *words, "train.micro_batch=1", "train.gradient_checkpointing=true").run
    assert RunDir(other).manifest()["training"]["relief"] == []
    assert all(torch.equal(weight, bits(other)[name]) for name, weight in bits(run).items())


def test_a_resumed_run_knows_what_fitted(
    cli: CommandLine, tiny_overrides: list[str], narrow: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [w for w in tiny_overrides if not w.startswith("train.micro_batch")]
    words += [*FAST, "train.pairs_per_step=4", "train.save_every=1"]
    whole = cli("train", *words).run

    training_step = PairTrainer.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as there:
        there.setattr(PairTrainer, "training_step", stopped)
        assert cli("train", *words, "run_dir=" + str(whole.parent / "cut")).code == 130
    narrow.clear()
    resumed = cli("resume", str(whole.parent / "cut")).run
    assert set(narrow) == {(1, True)}, "not a step was tried that could not fit"
    assert RunDir(resumed).manifest()["training"]["relief"] == ["gradient_checkpointing"]
    assert all(torch.equal(weight, bits(resumed)[name]) for name, weight in bits(whole).items())


def test_a_step_that_must_stay_whole_is_relieved(
    cli: CommandLine, tiny_overrides: list[str], narrow: list[tuple[int, bool]]
) -> None:
    words = [w for w in tiny_overrides if not w.startswith("train.micro_batch")]
    assert cli("train", *words, *FAST, "dpo=aot", "train.pairs_per_step=4").run
    assert narrow[:2] == [(4, False), (4, True)]


@pytest.mark.parametrize(("words", "advice"), [([], "A single pair"), (["dpo=aot"], "looks across them")], ids=str)
def test_what_cannot_fit_ends_with_what_to_do(
    cli: CommandLine, tiny_overrides: list[str], narrow: list[tuple[int, bool]], words: list[str], advice: str
) -> None:
    base = [w for w in tiny_overrides if not w.startswith("train.micro_batch")]
    done = cli("train", *base, *words, "train.pairs_per_step=4", "train.gradient_checkpointing=false")
    assert done.code == 2
    assert advice in done.err
    assert "leave out train.gradient_checkpointing=false" in done.err
    assert "Traceback" not in done.err
    assert not any(on for _, on in narrow)


def test_a_gpu_computes_layers_again_first_and_leaves_memory_of_its_own_last(
    cli: CommandLine, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of measures there, asked of a trainer that is told to be on one."""
    asked: list[tuple[int, bool]] = [(16384, False), (8192, False), (4096, False), (2048, True), (2048, True)]
    told: list[tuple[bool, list[str]]] = []

    def ask(self: PairTrainer, *_: object, **__: object) -> None:
        with monkeypatch.context() as there:
            there.setattr(type(self.args), "device", torch.device("cuda"))
            relief = Relief(self)
            told.extend((relief(tokens, finest), list(relief.taken)) for tokens, finest in asked)
        raise KeyboardInterrupt

    monkeypatch.setattr(PairTrainer, "training_step", ask)
    assert cli("train", *tiny_overrides).code == 130
    first, both = ["gradient_checkpointing"], ["gradient_checkpointing", "activation_offloading"]
    assert told == [(False, []), (True, first), (False, first), (True, both), (False, both)]


def test_the_host_keeps_what_layers_read_again(
    cli: CommandLine, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but that the host's memory is this one: what the layers keep goes through its hooks."""
    words = [*tiny_overrides, *FAST, "train.gradient_checkpointing=true"]
    plain = cli("train", *words).run
    kept: list[int] = []

    class Counted(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(pin_memory=False)
            pack = self.pack_hook
            self.pack_hook = lambda x: kept.append(x.numel()) or pack(x)

    def on_gpu(self: PairTrainer) -> Relief:
        relief = Relief(self)
        relief._offload()
        return relief

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counted)
    monkeypatch.setattr("dpo_lora.dpo.memory.Relief", on_gpu)
    offloaded = cli("train", *words).run
    assert kept
    assert all(torch.equal(weight, bits(offloaded)[name]) for name, weight in bits(plain).items())


def test_an_evaluation_that_does_not_fit_scores_fewer_at_a_time(
    cli: CommandLine, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_overrides, *FAST, "eval.batch=8"]
    plain = cli("train", *words).run
    tried: list[int] = []
    logps = PairTrainer._logps

    def cramped(self, batch, *args):
        tried.append(len(batch["input_ids"]) // 2)
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("there is no more")
        return logps(self, batch, *args)

    monkeypatch.setattr(PairTrainer, "_logps", cramped)
    cut = cli("train", *words).run
    assert tried[:3] == [7, 3, 1], "the seven held out, then half of what did not fit"
    assert set(tried[3:]) == {1}, "what fits is found out once"
    assert "a batch of 1 from here on" in (cut / "train.log").read_text()
    before, after = (read_jsonl(run / "eval_pairs.jsonl") for run in (plain, cut))
    for one, other in zip(before, after, strict=True):
        assert other["margin"] == pytest.approx(one["margin"], abs=1e-5)

    monkeypatch.setattr(PairTrainer, "_logps", lambda *_: exhausted())
    done = cli("train", *words)
    assert done.code == 2
    assert "Out of memory" in done.err
    assert "Traceback" not in done.err


def exhausted() -> None:
    raise torch.OutOfMemoryError("there is no more")

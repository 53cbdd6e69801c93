"""Held-out scores are exact over pairs: whatever the batch, the order or the library that computes them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpo_lora.evaluation import comparison
from dpo_lora.evaluation.figures import figures
from dpo_lora.evaluation.scores import PairScores
from dpo_lora.files import read_jsonl
from harness import CommandLine, make_pair

sys.path.insert(0, str(Path(__file__).parent))
import recompute  # the second program; needs no project


@pytest.fixture
def six_of_ten(make_trainer: Callable[..., Any]) -> list[dict]:
    """Ten pairs of which the moved adapter wins six, in the order W W L L  W W L L  W W.

    In batches of four the shares are 1/2, 1/2 and 1: their mean is 0.667, and the truth 0.600.
    """
    candidates = [make_pair(n) for n in range(10)]
    trainer = make_trainer(candidates)
    scores = trainer.score(trainer.heldout)
    wins = dict(zip(scores.ids, scores.wins, strict=True))
    assert set(wins.values()) <= {0.0, 1.0}
    wanted = [1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    return [
        pair if wins[pair["id"]] == want else {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
        for pair, want in zip(candidates, wanted, strict=True)
    ]


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_six_of_ten_is_six_tenths(batch: int, six_of_ten: list[dict], make_trainer: Callable[..., Any]) -> None:
    assert make_trainer(six_of_ten, f"eval.batch={batch}").evaluate()["eval/accuracy"] == pytest.approx(0.6, abs=1e-12)


def test_the_stock_trainer_says_two_thirds(
    six_of_ten: list[dict], tiny_model: Path, tmp_path: Path, move_adapter: Callable[..., None]
) -> None:
    """What the exact scores are for: a mean of batch means over batches of 4, 4 and 2."""
    import datasets
    import peft
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = datasets.Dataset.from_list([{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in six_of_ten])
    stock = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "stock"), per_device_eval_batch_size=4, use_cpu=True, bf16=False, report_to="none"
        ),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    assert stock.evaluate()["eval_rewards/accuracies"] == 0.0  # step 0: ties count as wrong
    move_adapter(stock.model)
    assert stock.evaluate()["eval_rewards/accuracies"] == pytest.approx(2 / 3, abs=1e-6)


def test_before_the_first_update_every_pair_is_a_tie(pairs: list[dict], make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(pairs, moved=False)
    scores = trainer.score(trainer.heldout)  # both passes, not the short cut of evaluate()
    assert np.abs(scores.margins).max() < 1e-5
    assert trainer.evaluate()["eval/accuracy"] == 0.5
    assert trainer.record.history[-1]["loss"] == pytest.approx(math.log(2), abs=1e-12)


def test_order_and_batch_change_nothing(pairs: list[dict], make_trainer: Callable[..., Any]) -> None:
    one, other = make_trainer(pairs), make_trainer(pairs[::-1], "eval.batch=5")
    a, b = (figures(t.score(t.heldout), 0.1, 0.95) for t in (one, other))
    assert a["accuracy"] == b["accuracy"]
    assert a["accuracy_bootstrap"] == b["accuracy_bootstrap"]
    assert a["margin"] == pytest.approx(b["margin"], abs=1e-7)


def test_equal_ids_do_not_share_a_reference(pairs: list[dict], make_trainer: Callable[..., Any]) -> None:
    unique = make_trainer(pairs)
    same = make_trainer([{**pair, "id": "one"} for pair in pairs])
    expected = unique.score(unique.heldout)
    found = same.score(same.heldout)
    assert sorted(found.reference_chosen) == pytest.approx(sorted(expected.reference_chosen), abs=1e-4)


def test_ld_alpha_weighs_the_loss_and_not_the_scores(pairs: list[dict], make_trainer: Callable[..., Any]) -> None:
    plain, weighed = make_trainer(pairs), make_trainer(pairs, "dpo.ld_alpha=0.3")
    a, b = plain.score(plain.heldout), weighed.score(weighed.heldout)
    np.testing.assert_allclose(a.margins, b.margins, atol=1e-5)


def test_the_second_program_recomputes_every_figure(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = cli("train", *tiny_overrides, "eval.every=2", "train.keep_best=eval/loss", "train.learning_rate=1e-2").run
    number, wrong = recompute.check(run)
    assert not wrong
    assert number > 150
    saved = json.loads((run / "eval.json").read_text())
    saved["after"]["margin"] += 1e-6
    (run / "eval.json").write_text(json.dumps(saved))
    assert recompute.check(run)[1], "it would not notice a wrong figure"


def test_stock_libraries_recompute_the_log_probabilities(cli: CommandLine, tiny_overrides: list[str]) -> None:
    """transformers and peft alone, from the saved adapter and the texts, one answer at a time."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = cli("train", *tiny_overrides, "train.learning_rate=1e-2").run
    base = json.loads((run / "run.json").read_text())["reference"]["base"]["identity"]["name"]
    tokenizer = AutoTokenizer.from_pretrained(run)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run).eval()
    rows = [row for row in read_jsonl(run / "eval_pairs.jsonl") if row["step"] == 4]
    assert len(rows) >= 5
    for row in rows:
        pair = make_pair(int(row["id"].removeprefix("pair-")))
        for side in ("chosen", "rejected"):
            start = len(tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True)["input_ids"])
            ids = torch.tensor([tokenizer.apply_chat_template(pair["prompt"] + pair[side])["input_ids"]])
            assert row[f"tokens_{side}"] == ids.shape[1] - start
            with torch.no_grad():
                policy = logp(model(ids).logits, ids, start)
                with model.disable_adapter():
                    reference = logp(model(ids).logits, ids, start)
            assert row[f"policy_{side}"] == pytest.approx(policy, abs=1e-4)
            assert row[f"reference_{side}"] == pytest.approx(reference, abs=1e-4)


def logp(logits: torch.Tensor, ids: torch.Tensor, start: int) -> float:
    each = torch.log_softmax(logits.double(), dim=-1)[0, start - 1 : -1]
    return float(each.gather(1, ids[0, start:, None]).sum())


def test_a_pair_that_is_held_out_twice_is_compared_once() -> None:
    def scores(numbers: list[int]) -> PairScores:
        rows = [{"id": str(n), "prompt_ids": [n], "chosen_ids": [1], "rejected_ids": [2]} for n in numbers]
        return PairScores.of(rows, np.asarray([[n, 0.0, 0.0, 0.0] for n in numbers], dtype=np.float64))

    run: Any = SimpleNamespace(manifest=dict)
    a, b = scores([1, 2, 2, 3]), scores([2, 3, 3, 4, 5])
    a_at, b_at = comparison._common(run, run, a, b)
    found = comparison.compare_pairs(a, b, a_at, b_at, 0.95)
    assert (found["pairs"], found["only_first"], found["only_second"]) == (2, 1, 2)

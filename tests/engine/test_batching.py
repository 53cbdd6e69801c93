"""Cuts are complete, within budget, deterministic; the step's gradient does not depend on them; memory is
found."""

from __future__ import annotations

import random

import pytest
import torch
from tests.engine import worlds

from dpo_lora.engine.batching import TokenBudget, common_opening, cut, pair_tokens, separable, why_inseparable
from dpo_lora.engine.forward import PackedForward
from dpo_lora.rules import LOSSES


def test_cut_keeps_every_pair_once_within_the_budget():
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.randrange(1, 300) for _ in range(rng.randrange(1, 20))]
        budget = rng.randrange(1, 1500)
        batches = cut(sizes, budget)
        assert sorted(i for b in batches for i in b.pairs) == list(range(len(sizes)))
        assert all(b.tokens == sum(sizes[i] for i in b.pairs) for b in batches)
        assert all(b.tokens <= budget or len(b.pairs) == 1 for b in batches)
        assert cut(sizes, budget) == batches


def test_cut_is_even():
    assert sorted(b.tokens for b in cut([10] * 8, 45)) == [40, 40]
    assert [b.tokens for b in cut([10] * 8, None)] == [80]
    assert len(cut([10] * 8, 5)) == 8
    assert len(cut([10] * 8, 5, whole=True)) == 1


def test_one_loss_of_several_keeps_the_pairs_together_and_so_does_a_router():
    assert separable(["sigmoid", "ipo"])
    assert why_inseparable(["sigmoid", "ipo"]) is None
    for loss in ("aot", "aot_unpaired", "sft"):
        assert not separable(["sigmoid", loss])
        assert loss in why_inseparable(["sigmoid", loss])
    assert not separable(["sigmoid"], router_aux_loss=True)
    assert "router" in why_inseparable(["sigmoid"], router_aux_loss=True)


@pytest.mark.parametrize("budget", [None, 90, 60, 20])
def test_gradient_does_not_depend_on_the_cut(budget, tmp_path):
    rows = worlds.pairs(6)
    trainer = worlds.trainer(worlds.model(), rows, tmp_path)
    batch = trainer.data_collator(rows)
    stock = trainer._compute_loss(trainer.model, batch, False)
    stock.backward()
    expected = worlds.gradients(trainer.model)
    PackedForward(trainer.model).install()
    total = 0.0
    for micro in cut([pair_tokens(row) for row in rows], budget):
        batch = trainer.data_collator([rows[i] for i in micro.pairs])
        loss = trainer._compute_loss(trainer.model, batch, False) * len(micro.pairs) / len(rows)
        loss.backward()
        total += loss.detach()
    assert worlds.close(total, stock.detach()) < 1e-5
    assert worlds.close(worlds.gradients(trainer.model), expected) < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_separable_is_true_to_trl(loss, tmp_path):
    """The table is checked against TRL's code: the mean over parts equals the mean over all, or it does
    not."""
    rows = worlds.pairs(6)
    smoothing = 0.1 if loss in ("exo_pair", "robust") else 0.0
    trainer = worlds.trainer(worlds.model(), rows, tmp_path, 0.02, loss_type=loss, label_smoothing=smoothing, beta=0.05)
    # a reference whose log-ratios have another order than the policy's: sorting losses then pair them
    # differently
    reference = trainer.compute_ref_log_probs(trainer.model, trainer.data_collator(rows))
    trainer.precompute_ref_logps = True
    noise = [[20, -30, 10, 40, -25, 0], [-10, 30, 20, -40, 15, 35]]
    for i, row in enumerate(rows):
        row["ref_chosen_logps"], row["ref_rejected_logps"] = (
            float(side[i]) + n[i] for side, n in zip(reference, noise, strict=True)
        )

    def loss_of(part):
        with torch.no_grad():
            return trainer._compute_loss(trainer.model, trainer.data_collator(part), False)

    same = worlds.close((loss_of(rows[:2]) + 2 * loss_of(rows[2:])) / 3, loss_of(rows)) < 1e-5
    assert same == separable([loss])


def test_budget_halves_without_losing_the_step():
    budget = TokenBudget(start=400, ceiling=400)
    seen, resets = [], []

    def step(batches):
        seen.append(len(batches))
        if max(b.tokens for b in batches) > 100:
            raise torch.OutOfMemoryError("no")
        return sum(len(b.pairs) for b in batches)

    assert budget.run([50] * 8, step, lambda: resets.append(1)) == 8
    assert seen == [1, 2, 4] and len(resets) == 2 and budget.tokens == 100
    for _ in range(5):
        budget.run([50] * 8, step, lambda: None)
    assert budget.tokens == 100, "grew back to what failed"


def test_a_small_step_that_does_not_fit_is_not_tried_again_as_it_was():
    """What is halved is what was in memory, not a budget that the step did not fill."""
    tried, asked = [], []

    def run(sizes, most, opening):
        def step(batches):
            tried.append([batch.tokens for batch in batches])
            if max(tried[-1]) > most:
                raise torch.OutOfMemoryError("no")

        def relieve(tokens, finest):
            asked.append((tokens, finest))
            return False

        budget = TokenBudget(start=16384, ceiling=16384)
        budget.run(sizes, step, lambda: None, opening=opening, relieve=relieve)
        assert budget.tokens == budget.ceiling
        return budget.tokens

    assert run([150] * 10, most=400, opening=0) == 375
    assert tried == [[1500], [750, 750], [300] * 5]
    assert asked == [(1500, False), (750, False)]
    tried.clear()
    assert run([190] * 10, most=700, opening=40) == (40 + 1520) // 2
    assert tried == [[1520], [608, 456, 456]], "150 tokens of each pair's own and 40 // 16 for the opening's keys"


def test_a_step_is_relieved_when_that_is_wanted_before_a_finer_cut_or_when_there_is_none():
    def run(budget, fits, wanted, whole=False):
        relieved, tried, asked = [], [], []

        def step(batches):
            tried.append((len(batches), len(relieved)))
            if not fits(len(batches), len(relieved)):
                raise torch.OutOfMemoryError("no")

        def relieve(tokens, finest):
            asked.append((tokens, finest))
            if len(relieved) < 2 and (finest or wanted(tokens)):
                relieved.append(tokens)
                return True
            return False

        budget.run([50] * 8, step, lambda: None, whole=whole, relieve=relieve, advice="Buy more.")
        return tried, asked

    tried, asked = run(TokenBudget(400, 400, floor=1), lambda cuts, relieved: relieved == 2, lambda tokens: False)
    assert tried == [(1, 0), (2, 0), (4, 0), (8, 0), (8, 1), (8, 2)]
    assert asked == [(400, False), (200, False), (100, False), (50, True), (50, True)]
    budget = TokenBudget(400, 800, floor=1)
    tried, _ = run(budget, lambda cuts, relieved: cuts == 2, lambda tokens: tokens <= 400)
    assert (tried, budget.tokens) == ([(1, 0), (1, 1), (1, 2), (2, 2)], 200)
    tried, _ = run(TokenBudget(100, 100), lambda cuts, relieved: relieved == 1, lambda tokens: False, whole=True)
    assert tried == [(1, 0), (1, 1)]
    with pytest.raises(ValueError, match=r"8 pairs of a step.*Buy more"):
        run(TokenBudget(100, 100), lambda cuts, relieved: False, lambda tokens: False, whole=True)


def test_a_common_opening_counts_once_a_row():
    prompts = [[*range(10, 30), n, n + 1] for n in range(6)]
    assert common_opening(prompts) == 20
    assert common_opening([*prompts, [*range(10, 21)]]) == 10, "the shortest prompt's last token stays its own"
    assert common_opening([*prompts, [9, 9]]) == 0 == common_opening(prompts[:1]) == common_opening([])
    assert common_opening([[*range(5), n] for n in range(3)]) == 0, "too short to be worth it"
    seen = []
    budget = TokenBudget(start=53, ceiling=53, floor=1)
    budget.run([30] * 6, lambda cuts: seen.append([c.pairs for c in cuts]), lambda: None, opening=20)
    budget.run([30] * 6, lambda cuts: seen.append([c.pairs for c in cuts]), lambda: None)
    assert [len(cuts) for cuts in seen] == [2, 6], "20 + 3 * 10 tokens fit, with keys for each pair; 2 * 30 do not"


def test_budget_grows_to_its_ceiling_and_reports_the_impossible():
    budget = TokenBudget(start=100, ceiling=350, patience=1)
    for _ in range(5):
        budget.run([50] * 8, len, lambda: None)
    assert budget.tokens == 200

    def never(batches):
        raise torch.OutOfMemoryError("no")

    with pytest.raises(ValueError, match="does not fit"):
        budget.run([50] * 8, never, lambda: None)

    def broken(batches):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        budget.run([50] * 8, broken, lambda: None)

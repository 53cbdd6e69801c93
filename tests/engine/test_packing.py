"""The plan: every labelled place has its entry, branches share positions, odd prompts and cuts are right."""

from __future__ import annotations

import pytest
import torch
from tests.engine import worlds
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_lora.engine.packing import PairCollator, plan_batch, plan_pairs


def expected_labels(batch):
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 3, 8, 15, 20])
@pytest.mark.parametrize("begin", [[], [*range(20, 32)], [*range(20, 32), *range(20, 25)]], ids=len)
def test_every_label_has_its_entry_and_its_context(begin, max_length, mode):
    rows = worlds.pairs(8)
    rows.append({"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [5, 9]})
    rows.append({"prompt_ids": [4, 5], "chosen_ids": [6, 7], "rejected_ids": [6, 7]})
    rows.append({"prompt_ids": [4, 5], "chosen_ids": [6], "rejected_ids": [6, 7, 8]})
    rows = [{**row, "prompt_ids": [*begin, *row["prompt_ids"]]} for row in rows]
    batch = DataCollatorForPreference(0, max_length=max_length, truncation_mode=mode)(rows)
    labels = expected_labels(batch)
    plan = plan_batch(batch["input_ids"], batch["attention_mask"], labels)
    if max_length is None:  # one row has no prompt of its own: its last common token has a head entry
        assert plan.opening == max(len(begin) - 1, 0)

    spread = plan.scatter(plan.head_labels + 1.0)
    shifted = labels[:, 1:]
    assert torch.equal(spread.long(), torch.where(shifted == -100, 0, shifted + 1))

    # walk each sequence through the row: its tokens and positions are all there, in order
    lengths = batch["attention_mask"].sum(1)
    offset = plan.opening
    for i, (shared, chosen, rejected) in enumerate(plan.segments):
        starts = {i: offset + shared, len(rows) + i: offset + shared + chosen}
        for side, rest in ((i, chosen), (len(rows) + i, rejected)):
            where = [*range(plan.opening), *range(offset, offset + shared), *range(starts[side], starts[side] + rest)]
            assert torch.equal(plan.input_ids[0, where], batch["input_ids"][side, : lengths[side] - 1])
            assert torch.equal(plan.position_ids[0, where], torch.arange(len(where)))
            at = (shifted[side] != -100).nonzero()[:, 0]
            assert plan.head_rows[plan.slots[side, at]].tolist() == [where[t] for t in at]
        offset += shared + chosen + rejected
    assert offset == plan.tokens

    sides = [worlds.truncate_pair(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"], max_length, mode) for r in rows]
    direct = plan_pairs(sides)
    assert direct.segments == plan.segments and direct.opening == plan.opening
    for name in ("input_ids", "position_ids", "head_rows", "head_labels", "slots"):
        assert torch.equal(getattr(direct, name), getattr(plan, name)), name


def test_a_pair_costs_its_prompt_once():
    plan = plan_pairs([(([1, 2, 3, 4, 5], 3), ([1, 2, 3, 6, 7, 8], 3))])
    assert plan.segments == ((3, 1, 2),)
    assert plan.tokens == 6 and len(plan.head_rows) == 5


def test_what_all_pairs_begin_with_costs_once():
    begin = [*range(50, 60)]
    sides = [(([*begin, n, 1, 2], 11), ([*begin, n, 3], 11)) for n in range(4)]
    plan = plan_pairs(sides)
    assert plan.opening == 10 and plan.segments == ((1, 1, 0),) * 4
    assert plan.tokens == 10 + 4 * 2
    weights = plan.token_weights()[0]
    assert weights[:10].tolist() == [8.0] * 10 and weights[10:].tolist() == [2.0, 1.0] * 4
    assert plan_pairs(sides[:1]).opening == 0, "one pair has its prompt once anyway"
    assert plan_pairs([*sides, (([*begin[:5], 1, 2], 5), ([*begin[:5], 3, 4], 5))]).opening == 0, "five are too few"


def test_same_first_answer_tokens_are_scored_once():
    plan = plan_pairs([(([1, 2, 3, 4], 2), ([1, 2, 3, 5], 2))])
    assert plan.segments == ((3, 0, 0),)
    assert len(plan.head_rows) == 3  # token 3 once, then 4 and 5 from the same position


def test_left_padding_is_refused():
    ids = torch.tensor([[0, 1, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match="padded on the right"):
        plan_batch(ids, (ids != 0).long(), ids)


def test_collator_plans_ahead():
    rows = worlds.pairs(3)
    batch = PairCollator(DataCollatorForPreference(0))(rows)
    assert len(batch["pair_plan"].segments) == 3
    moved = batch["pair_plan"].to("cpu")
    assert moved.segments == batch["pair_plan"].segments
    weights = batch["pair_plan"].token_weights()
    assert weights.sum() == batch["attention_mask"].sum() - 6

"""The LM head folded tile by tile says what a dense log-softmax in float64 says, on a CPU and as written for a GPU."""

from __future__ import annotations

import pytest
import torch

from dpo_lora.engine import head
from dpo_lora.engine.head import HeadRule, token_scores

WIDTH = 16
BEST_IS_FIRST = [True, False, True, False, True, True, True]
"""Of the first tokens of a `world`: whether the label is the first of the ids with the best logit."""


def world(tokens: int, vocabulary: int, width: int, bias: bool) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor]:
    """hidden [tokens, 16], a head and labels [tokens], for tiles of ``width`` ids, at least three.

    The first tokens' labels have the best logit there is: equal ones of two tiles, equal ones within a tile, and alone
    in the first tile, in the second and in the last. All numbers are small multiples of 1/4, so that logits are exact
    in any order of their sums, in bfloat16, too: what is equal is equal in every tile.
    """
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(16, vocabulary, bias=bias).requires_grad_(False)
    lm_head.weight.copy_(torch.randint(-3, 4, lm_head.weight.shape) / 4)
    if bias:
        lm_head.bias.copy_(torch.randint(-2, 3, (vocabulary,)) / 4)
    hidden = torch.randint(-3, 4, (tokens, 16)) / 2
    best = [5, 2 * width + 6, width + 1, width + 4, 0, width + 8, vocabulary - 1]
    for token, label in enumerate(best):
        hidden[token] = 1 - 2 * torch.randint(0, 2, (16,))
        lm_head.weight[label] = 0.75 * hidden[token]
    for token in (1, 3):  # as the one before
        hidden[token] = hidden[token - 1]
        for values in (lm_head.weight, *([lm_head.bias] if bias else [])):
            values[best[token]] = values[best[token - 1]]
    return hidden, lm_head, torch.cat([torch.tensor(best), torch.randint(0, vocabulary, (tokens - len(best),))])


def dense(hidden, lm_head, labels, rule) -> dict[str, torch.Tensor]:
    """The definitions, for hidden in float64."""
    z = hidden @ lm_head.weight.double().t()
    if lm_head.bias is not None:
        z = z + lm_head.bias.double()
    z = rule.scale * z
    if rule.softcap is not None:
        z = rule.softcap * torch.tanh(z / rule.softcap)
    log_p = z.log_softmax(1)
    return {
        "log_probs": log_p.gather(1, labels[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(1),
        "mean_logits": z.mean(1),
        "is_top1": z.argmax(1) == labels,
    }


@pytest.fixture
def tiles(monkeypatch) -> list[int]:
    """How wide the tiles were that were folded in."""
    seen, add = [], head._Fold.add
    monkeypatch.setattr(head._Fold, "add", lambda self, *tile: seen.append(len(tile[0])) or add(self, *tile))
    return seen


@pytest.mark.parametrize("as_on_gpu", [False, True], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("rule", [HeadRule(), HeadRule(0.5), HeadRule(2.0, 5.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("gradient", [False, True], ids=["scores", "gradient"])
def test_tiles_add_up_to_the_whole_vocabulary(gradient, bias, rule, as_on_gpu, monkeypatch, request):
    if as_on_gpu:
        monkeypatch.setattr(head._Fold, "add", head._Fold._add_compiled)
    tiles = request.getfixturevalue("tiles")
    monkeypatch.setitem(head._TILE_ELEMENTS, "cpu", 0)
    monkeypatch.setattr(head, "_LEAST_WIDTH", WIDTH)
    hidden, lm_head, labels = world(40, 100, WIDTH, bias)
    upstream = torch.linspace(-1, 1, len(labels))

    states, exact = hidden.clone().requires_grad_(gradient), hidden.double().requires_grad_()
    found, right = token_scores(states, lm_head, labels, rule, head.STATISTICS), dense(exact, lm_head, labels, rule)
    assert tiles == [WIDTH] * 6 + [4]
    assert right["is_top1"][: len(BEST_IS_FIRST)].tolist() == BEST_IS_FIRST
    assert torch.equal(found.pop("is_top1"), right.pop("is_top1"))
    assert set(found) == set(right)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), right[name], rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    if gradient:
        found["log_probs"].backward(upstream)
        right["log_probs"].backward(upstream.double())
        torch.testing.assert_close(states.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_a_tile_is_as_wide_as_its_size_allows_and_no_narrower_than_the_least(monkeypatch, tiles):
    monkeypatch.setitem(head._TILE_ELEMENTS, "cpu", 200 * 64)
    monkeypatch.setattr(head, "_LEAST_WIDTH", 128)
    for tokens in (64, 20, 2000):
        hidden, lm_head, labels = world(tokens, 500, 128, bias=False)
        token_scores(hidden, lm_head, labels, HeadRule())
    assert tiles == [192, 192, 116, 500, 128, 128, 128, 116], "whole multiples of 64; all at once; the least"

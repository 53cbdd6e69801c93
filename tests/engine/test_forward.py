"""Packed training computes what stock TRL computes: loss, metrics, gradients, for every loss and option."""

from __future__ import annotations

import pytest
import torch
from tests.engine import worlds

from dpo_lora.engine.decoder import read_layers
from dpo_lora.engine.forward import PackedForward
from dpo_lora.rules import LOSSES

OPTIONS = [{"loss_type": loss, "label_smoothing": 0.1 if loss in ("exo_pair", "robust") else 0.0} for loss in LOSSES]
# discopop weighs exp(-logits) against itself at a temperature of 0.05; small logits keep its gradient well
# conditioned
next(o for o in OPTIONS if o["loss_type"] == "discopop")["beta"] = 0.01
OPTIONS += [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    {"ld_alpha": 0.5},
    {"use_weighting": True},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    {"max_length": 9},
    {"max_length": 9, "truncation_mode": "keep_end"},
    {"gradient_checkpointing": True},
    {"pad_to_multiple_of": 8},
]


def losses(trainer, batch, model):
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(model, batch, False)
    loss.backward()
    metrics = {k: v[-1] for k, v in trainer._metrics["train"].items() if k != "num_tokens"}
    return loss.detach(), worlds.gradients(trainer.model), metrics


def compare(base, rows, tmp_path, engine=None, **options):
    trainer = worlds.trainer(base, rows, tmp_path, **options)
    batch = trainer.data_collator(rows)
    stock = losses(trainer, batch, trainer.model)
    statistics = ("entropy", "mean_logits", "is_top1") + (("log_sum_sq_probs",) if trainer.use_weighting else ())
    packed = PackedForward(trainer.model, statistics=statistics, **(engine or {}))
    packed.install()  # so that TRL's reference pass, which calls self.model, is packed too
    ours = losses(trainer, batch, trainer.model)
    packed.detach()
    assert worlds.close(ours[0], stock[0]) < 1e-5
    assert worlds.close(ours[1], stock[1]) < 1e-5
    for name, value in stock[2].items():
        assert ours[2][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert set(ours[2]) == set(stock[2])
    again = losses(trainer, batch, trainer.model)
    assert torch.equal(again[0], stock[0]), "detach did not give the model back"


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{v}" for v in o.values()))
def test_every_loss_and_option(options, tmp_path):
    compare(worlds.model("llama"), worlds.pairs(5), tmp_path, **options)


@pytest.mark.parametrize("name", sorted(worlds.configs()))
def test_every_architecture(name, tmp_path):
    compare(worlds.model(name), worlds.pairs(4), tmp_path)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_pairs_that_begin_alike(name, tmp_path):
    compare(worlds.model(name), worlds.pairs(4, opening=15), tmp_path)


@pytest.mark.parametrize("opening", [0, 6])
@pytest.mark.parametrize("engine", [{}, {"layers": "plain"}, {"layers": "plain", "kernel": "block"}], ids=str)
@pytest.mark.parametrize("name", worlds.WINDOWS)
def test_a_window_shorter_than_the_pairs(name, engine, opening, tmp_path):
    compare(worlds.windowed(name), worlds.pairs(4, opening=opening), tmp_path, engine=engine)


@pytest.mark.parametrize("opening", [0, 15])
@pytest.mark.parametrize("kernel", ["sdpa", "block"])
def test_every_kernel(kernel, opening, tmp_path):
    rows = worlds.pairs(3, opening=opening)
    compare(worlds.model("qwen3"), rows, tmp_path, engine={"kernel": kernel, "layers": "plain"})


@pytest.mark.parametrize("options", [{"max_length": 20}, {"max_length": 20, "truncation_mode": "keep_end"}], ids=str)
def test_pairs_that_begin_alike_are_cut_as_stock_cuts_them(options, tmp_path):
    compare(worlds.model("llama"), worlds.pairs(5, opening=15), tmp_path, **options)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize(
    ("engine", "opening"), [({"layers": "plain"}, 0), ({"recompute": True}, 0), ({"recompute": True}, 15)], ids=str
)
def test_layers_by_hand_and_plain(engine, opening, name, tmp_path):
    base = worlds.model(name)
    assert read_layers(base.base_model.requires_grad_(False)) is not None
    compare(base, worlds.pairs(4, opening=opening), tmp_path, engine=engine)

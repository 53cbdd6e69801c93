"""Fifty optimizer steps, packed and cut, give the loss curve and the adapter of stock TRL."""

from __future__ import annotations

import torch
from tests.engine import worlds

from dpo_lora.engine.batching import cut, pair_tokens
from dpo_lora.engine.forward import PackedForward


def curve(trainer, rows, steps, budget):
    """Losses of the steps; budget 0 is stock: all pairs in one padded batch."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for step in range(steps):
        part = [rows[(4 * step + i) % len(rows)] for i in range(4)]
        total = 0.0
        for micro in cut([pair_tokens(row) for row in part], budget or None):
            batch = trainer.data_collator([part[i] for i in micro.pairs])
            loss = trainer._compute_loss(trainer.model, batch, False) * len(micro.pairs) / 4
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return torch.tensor(losses), torch.cat([p.detach().flatten() for p in parameters])


def test_fifty_steps_follow_stock(tmp_path):
    rows = worlds.pairs(12)
    stock = worlds.trainer(worlds.model(), rows, tmp_path / "stock")
    expected, stock_adapter = curve(stock, rows, 50, 0)
    ours = worlds.trainer(worlds.model(), rows, tmp_path / "ours")
    PackedForward(ours.model).install()
    losses, adapter = curve(ours, rows, 50, 50)
    assert (losses - expected).abs().max() < 1e-4
    assert worlds.close(adapter, stock_adapter) < 1e-3  # Adam divides by near-zero second moments in early steps

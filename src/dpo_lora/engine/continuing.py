"""Answers token by token on the parts of `layer.py`, rows of several adapters in one batch.

A step of decoding reads every weight once however many rows there are, so on a CPU it should cost little more than
that reading; bench/decoding.py says what transformers' cached pass takes, with PEFT's switch of adapters by row.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from dpo_lora.engine.cpu_passes import gated, normalise, rotate
from dpo_lora.engine.decoder import final_norm, read_layers, rotations_of
from dpo_lora.engine.eligibility import read_facts
from dpo_lora.engine.head import HeadRule
from dpo_lora.engine.layer import LayerParts, Rotation, normalise_heads
from dpo_lora.engine.lowrank import Group, project_down, watched
from dpo_lora.engine.products import linear

BASE = "__base__"  # PEFT's name for rows without an adapter


class CachedSteps:
    """A causal LM that reads tokens on, [N, t] at a time, and says what could come next.

    Rows are in as many equal groups as there are adapters: the first N / adapters rows are the first adapter's.
    """

    def __init__(self, base: nn.Module, adapters: list[list[LayerParts]], room: int) -> None:
        self.base, self.backbone, self.room = base, base.base_model, room
        self.layers = list(zip(*adapters, strict=True))  # of each layer the parts under every adapter
        self.length = 0
        self.keys: list[Tensor] = []  # of each layer [N, key heads, room, head_dim]
        self.values: list[Tensor] = []

    @classmethod
    def of(cls, model: nn.Module, adapters: tuple[str, ...], room: int) -> CachedSteps | None:
        """None where the model must run its own forward: another device, format or architecture than `decoder.py`'s.

        Args:
            model: plain or under PEFT, in evaluation mode.
            adapters: PEFT's names, "__base__" for none; without any the model is taken as it is.
            room: the most tokens a row will have, padding included.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(base, PreTrainedModel):
            return None
        head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
        if type(head) is not nn.Linear or not isinstance(embedding, nn.Embedding) or watched(head, embedding):
            return None
        if head.bias is not None or head.weight.device.type != "cpu":
            return None
        if read_facts(model, room) is not None or HeadRule.of(base.config.get_text_config()) != HeadRule():
            return None
        read = []
        for name in adapters or (None,):
            active = None if name == BASE else name
            with contextlib.nullcontext() if name is None else use_adapter(model, active):
                layers = read_layers(base.base_model)
            if layers is None or any(parts.window is not None and room > parts.window for parts in layers):
                return None
            read.append(layers)
        return cls(base, read, room)

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits of the token after the last one, [N, vocabulary].

        Args:
            ids: [N, t], the new tokens.
            mask: [N, tokens so far], these included; 0 at padding.
            positions: [N, t].
        """
        count, width = ids.shape
        before, self.length = self.length, self.length + width
        x = self.backbone.embed_tokens(ids)
        rotations = rotations_of(self.backbone, [parts[0] for parts in self.layers], x, positions)
        query, key = torch.arange(before, self.length)[:, None], torch.arange(self.length)
        # A padding token sees itself: a row of the softmax without any key would be NaN and spread.
        seen = (mask.bool()[:, None, None] & (key <= query)) | (key == query)
        x = x.flatten(0, 1)
        for number, parts in enumerate(self.layers):
            x = self._layer(x, parts, rotations[parts[0].kind], seen, number)
        last = x.view(count, width, -1)[:, -1]
        normed, _ = normalise(last, *final_norm(self.backbone))
        return linear(normed, self.base.get_output_embeddings().weight)

    def _layer(self, x: Tensor, parts: tuple[LayerParts, ...], rotation: Rotation, seen: Tensor, number: int) -> Tensor:
        first = parts[0]
        normed, _ = normalise(x, first.attention_norm, first.epsilon)
        count = len(seen)
        q, k, v = (y.view(len(x), -1, first.head_dim) for y in _project(normed, [p.qkv for p in parts]))
        q, k, _ = normalise_heads(q, k, first)
        rotate(q, k, rotation.cos, rotation.sin, 1.0)
        q, k, v = (y.view(count, -1, *y.shape[1:]).transpose(1, 2) for y in (q, k, v))
        keys, values = self._keep(number, k, v)
        attended = functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=seen, scale=first.scale, enable_gqa=q.shape[1] != keys.shape[1]
        )
        attended = attended.transpose(1, 2).reshape(len(x), -1)
        middle = _added(x, attended, [p.output for p in parts], first.output_norm, first.epsilon)
        normed, _ = normalise(middle, first.mlp_norm, first.epsilon)
        gate, up = _project(normed, [p.gate_up for p in parts])
        active = gated(gate, up, first.activation)
        return _added(middle, active, [p.down for p in parts], first.down_norm, first.epsilon)

    def _keep(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new keys and values [N, key heads, t, head_dim] behind the earlier ones; all of them."""
        if number == len(self.keys):
            shape = (*keys.shape[:2], self.room, keys.shape[3])
            self.keys.append(keys.new_empty(shape))
            self.values.append(values.new_empty(shape))
        kept = self.keys[number], self.values[number]
        for store, new in zip(kept, (keys, values), strict=True):
            store[:, :, self.length - keys.shape[2] : self.length] = new
        return kept[0][:, :, : self.length], kept[1][:, :, : self.length]


def _added(x: Tensor, inner: Tensor, groups: list[Group], norm: Tensor | None, epsilon: float) -> Tensor:
    """x + norm(group(inner)), [rows, hidden]."""
    if norm is None:
        [out] = _project(inner, groups, start=x)
        return out
    [y] = _project(inner, groups)
    return normalise(y, norm, epsilon)[0].add_(x)


def _project(x: Tensor, groups: list[Group], start: Tensor | None = None) -> list[Tensor]:
    """As `lowrank.project`, with the rows' adapters: x [T, in], of which groups[i] have the i-th equal part."""
    outs = []
    for weight, bias in zip(groups[0].weights, groups[0].biases, strict=True):
        y = linear(x, weight, start)
        outs.append(y if bias is None else y.add_(bias))
    share = len(x) // len(groups)
    for number, group in enumerate(groups):
        rows = slice(number * share, (number + 1) * share)
        low = project_down(x[rows], group)
        for y, up, ranks in zip(outs, group.ups, group.ranks(), strict=True):
            if ranks is not None:
                y[rows].addmm_(low[:, ranks], up.t())
    return outs

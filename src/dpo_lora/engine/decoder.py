"""Runs a whole backbone by `layer.py` where every module is exactly what that file computes; else says no.

The modules are read, not changed: no forward is replaced, no hook set. The reading is repeated for every
pass, so a switched adapter, a merged weight or a new hook is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from dpo_lora.engine import cpu_passes, gpu_passes
from dpo_lora.engine.layer import LayerParts, Rotation, run_layer
from dpo_lora.engine.lowrank import Projection, prepared, read_projection, watched
from dpo_lora.engine.native import passes as native_passes
from dpo_lora.engine.packing import PairPlan


@dataclass(frozen=True)
class _Family:
    """An architecture of the kind that `layer.py` computes, by the names of its classes and modules.

    backbone, rest: what the classes' names begin with.
    mlp_norm: a layer's norm before the MLP.
    behind: the norms behind the attention's and the MLP's last projection, where there are any.
    epsilon: a norm's field of that name.
    centred: the norms' weights count from one.
    by_kind: layers of different attention rotate by different frequencies.
    windowed: a sliding window in the config holds for every layer; else a layer that has one knows it.
    """

    module: ModuleType
    backbone: str
    rest: str
    mlp_norm: str = "post_attention_layernorm"
    behind: tuple[str, ...] = ()
    activation: str = "silu"
    epsilon: str = "variance_epsilon"
    centred: bool = False
    by_kind: bool = False
    windowed: bool = False

    def made(self, part: nn.Module, kind: str) -> bool:
        """Whether the part is exactly this family's ``kind``: "Model", "RMSNorm", "Attention", ..."""
        return type(part) is getattr(self.module, (self.backbone if kind == "Model" else self.rest) + kind)

    def norms(self, layer: nn.Module) -> list[nn.Module]:
        """Before the attention and the MLP; behind them; of q's heads and of k's: as far as the layer has them."""
        of_layer = [getattr(layer, name) for name in ("input_layernorm", self.mlp_norm, *self.behind)]
        attention = layer.self_attn
        return [*of_layer, *(getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name))]

    def window(self, attention: nn.Module) -> int | None:
        """How many tokens of its sequence a token sees, itself included; None: all before it."""
        return attention.config.sliding_window if self.windowed else getattr(attention, "sliding_window", None)

    def factors(self, norms: list[nn.Module]) -> list[Tensor]:
        """What each norm multiplies by. Added to one, a weight would lose most of itself in bfloat16."""
        weights = [norm.weight.detach() for norm in norms]
        if not self.centred:
            return weights
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        return list(torch._foreach_add([weight.to(wide) for weight in weights], 1.0))


_FAMILIES = (
    _Family(modeling_llama, "Llama", "Llama"),
    _Family(modeling_mistral, "Mistral", "Mistral", windowed=True),
    _Family(modeling_qwen2, "Qwen2", "Qwen2"),
    _Family(modeling_qwen3, "Qwen3", "Qwen3"),
    _Family(
        modeling_gemma3,
        "Gemma3Text",
        "Gemma3",
        mlp_norm="pre_feedforward_layernorm",
        behind=("post_attention_layernorm", "post_feedforward_layernorm"),
        activation="gelu",
        epsilon="eps",
        centred=True,
        by_kind=True,
    ),
)
_ACTIVATIONS = {"silu": (SiLUActivation, nn.SiLU), "gelu": (GELUTanh,)}


def passes_for(weight: Tensor) -> ModuleType | None:
    """What a layer of this weight's device and format computes by; None where nothing is written for it.

    On a GPU products are in the format of the weights, which autocast, where it is on, must agree with.
    """
    device, dtype = weight.device.type, weight.dtype
    autocast = torch.is_autocast_enabled(device)
    if device == "cpu" and dtype in (torch.float32, torch.float64) and not autocast:
        return cpu_passes
    if device == "cuda" and dtype == torch.bfloat16:
        return gpu_passes if not autocast or torch.get_autocast_dtype(device) == dtype else None
    return None


def run_decoder(backbone: nn.Module, layers: list[LayerParts], plan: PairPlan) -> Tensor:
    """Last hidden states [R, hidden] of the plan's scored rows, by the backbone's layers as `read_layers` gave them."""
    x = backbone.embed_tokens(plan.input_ids)
    with torch.autocast(x.device.type, enabled=False):
        rotations = rotations_of(backbone, layers, x, plan.position_ids)
        x = x[0]
        for parts in layers[:-1]:
            x = run_layer(x, parts, rotations[parts.kind], plan)
        x = run_layer(x, layers[-1], rotations[layers[-1].kind], plan, plan.scored_rows)
        return _FinalNorm.apply(x, *final_norm(backbone), layers[0].passes)


def rotations_of(
    backbone: nn.Module, layers: list[LayerParts], x: Tensor, positions: Tensor
) -> dict[str | None, Rotation]:
    """The rotations of tokens at these positions [N, t], row after row, by the kinds of layers; x tells the format."""
    found = {}
    for kind in {parts.kind for parts in layers}:
        of_kind = {} if kind is None else {"layer_type": kind}
        cos, sin = backbone.rotary_emb(x, position_ids=positions, **of_kind)
        half = cos.shape[-1] // 2
        found[kind] = Rotation(*(each.flatten(0, 1)[:, None, :half].contiguous() for each in (cos, sin)))
    return found


def final_norm(backbone: nn.Module) -> tuple[Tensor, float]:
    """What the norm behind the last layer multiplies by, [hidden], and its epsilon."""
    family = _family(backbone)
    assert family is not None, "layers were read"
    [factor] = family.factors([backbone.norm])
    return factor, getattr(backbone.norm, family.epsilon)


def read_layers(backbone: nn.Module, recompute: bool = False) -> list[LayerParts] | None:
    """Every layer's parts, or None if one module of the backbone is not exactly as expected.

    recompute: keep only each layer's input for the backward pass and compute the rest again; the model's own gradient
        checkpointing asks for the same.
    """
    recompute = recompute or (getattr(backbone, "gradient_checkpointing", False) and backbone.training)
    family = _family(backbone)
    passes = passes_for(backbone.get_input_embeddings().weight)
    if family is None or passes is None or not _is_norm(backbone.norm, family) or watched(backbone):
        return None
    layers = backbone.layers[: backbone.config.num_hidden_layers]
    read = [_read_layer(layer, family, passes) for layer in layers]
    if any(projections is None for projections in read):
        return None
    groups = iter(prepared([group for q, k, v, o, g, u, d in read for group in ((q, k, v), (o,), (g, u), (d,))]))
    norms = [family.norms(layer) for layer in layers]
    head_dims = [layer.self_attn.head_dim for layer in layers]
    found = family.factors([norm for of_layer in norms for norm in of_layer])
    if passes is cpu_passes and native_passes.serve([*found, *family.factors([backbone.norm])], read, head_dims):
        passes = native_passes
    factors = iter(found)
    made = []
    for layer, projections, of_layer in zip(layers, read, norms, strict=True):
        attention_norm, mlp_norm, *more = (next(factors) for _ in of_layer)
        output_norm, down_norm = more[: len(family.behind)] or (None, None)
        parts = LayerParts(
            attention_norm=attention_norm,
            qkv=next(groups),
            output=next(groups),
            mlp_norm=mlp_norm,
            gate_up=next(groups),
            down=next(groups),
            epsilon=getattr(layer.input_layernorm, family.epsilon),
            adapters=tuple(weight for p in projections for weight in (p.down, p.up)),
            head_dim=layer.self_attn.head_dim,
            scale=layer.self_attn.scaling,
            passes=passes,
            activation=family.activation,
            head_norms=tuple(more[len(family.behind) :]),
            output_norm=output_norm,
            down_norm=down_norm,
            kind=layer.self_attn.layer_type if family.by_kind else None,
            window=family.window(layer.self_attn),
            recompute=recompute,
        )
        made.append(parts)
    return made


def _family(backbone: nn.Module) -> _Family | None:
    return next((family for family in _FAMILIES if family.made(backbone, "Model")), None)


def _is_norm(module: nn.Module, family: _Family) -> bool:
    return family.made(module, "RMSNorm") and not module.weight.requires_grad and not watched(module)


def _read_layer(layer: nn.Module, family: _Family, passes: ModuleType) -> list[Projection] | None:
    """q, k, v, output, gate, up and down, or None if the layer is not exactly as expected."""
    attention, mlp = layer.self_attn, layer.mlp
    kinds = {layer: "DecoderLayer", attention: "Attention", mlp: "MLP"}
    if not all(family.made(part, kind) for part, kind in kinds.items()):
        return None
    if watched(*kinds) or not isinstance(mlp.act_fn, _ACTIVATIONS[family.activation]):
        return None
    if not all(_is_norm(norm, family) for norm in family.norms(layer)):
        return None
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    linears = [*(getattr(attention, n) for n in names), mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    read = [read_projection(linear, mixed=passes is gpu_passes) for linear in linears]
    if any(p is None or p.weight.dtype != layer.input_layernorm.weight.dtype for p in read):
        return None
    return None if attention.attention_dropout and attention.training else read


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon, passes):
        out, inverse = passes.normalise(x, weight, epsilon)
        ctx.save_for_backward(x, inverse, weight)
        ctx.passes = passes
        return out

    @staticmethod
    def backward(ctx, grad):
        x, inverse, weight = ctx.saved_tensors
        return ctx.passes.normalise_backward(grad, x, inverse, weight, None), None, None, None

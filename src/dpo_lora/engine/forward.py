"""The packed forward pass: stands where TRL's `_compute_loss` calls the model, and answers in TRL's
layout."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from dpo_lora.engine.attention import attach, default_kernel, packed_rows
from dpo_lora.engine.decoder import read_layers, run_decoder
from dpo_lora.engine.head import STATISTICS, HeadRule, token_scores
from dpo_lora.engine.lanes import lanes_for, lanes_here, score_in_lanes
from dpo_lora.engine.layer import LayerParts
from dpo_lora.engine.packing import PairPlan, plan_batch


class PackedForward:
    """A causal LM (plain or under PEFT) scored by packed rows.

    `packed(input_ids=..., attention_mask=..., labels=..., fused_lm_head=True)` takes what TRL's
    `_compute_loss` gives its model, and returns what `add_fused_lm_head` returns: log_probs and the
    statistics in [2B, L-1]. A batch that carries `pair_plan` (made by `PairCollator`) is not planned again.

    statistics: which of head.STATISTICS to compute; drop those that nobody logs. TRL's `_compute_loss` reads
    entropy, mean_logits and is_top1 in every call, so what is dropped comes back as zeros; log_sum_sq_probs
    (`use_weighting`) changes the loss and must be asked for.
    kernel: name from attention.KERNELS, None for the default of the model's device and dtype.
    layers: "auto" runs the backbone by `decoder.py` where that is possible, "plain" never does.
    recompute: of the layers run by `decoder.py`, keep only the inputs for the backward pass.
    lanes: how many rows a row is divided into that `decoder.py` runs at once on a CPU (`lanes.py`); None: as many as
        pay.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: tuple[str, ...] = ("entropy", "mean_logits", "is_top1"),
        kernel: str | None = None,
        layers: str = "auto",
        recompute: bool = False,
        lanes: int | None = None,
    ) -> None:
        if layers not in ("auto", "plain"):
            raise ValueError(f"layers is {layers!r}; use 'auto' (by hand where possible) or 'plain' (the model's own)")
        self.layers, self.recompute, self.lanes = layers, recompute, lanes
        self.model = model
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.text_config = self.base.config.get_text_config()
        self.rule = HeadRule.of(self.text_config)
        self.statistics = statistics
        weight = self.base.get_output_embeddings().weight
        self.kernel = kernel or default_kernel(
            weight.device,
            weight.dtype,
            getattr(self.text_config, "attn_logit_softcapping", None),
            getattr(self.text_config, "head_dim", None)
            or self.text_config.hidden_size // self.text_config.num_attention_heads,
        )
        self._restore_attention = attach(self.base, self.kernel)
        self._restore_forward: Callable[[], None] | None = None

    @property
    def attention(self) -> str:
        """Name of the kernel in use: where the layers are written out, the one of their passes."""
        layers = self._written_out()
        return self.kernel if layers is None else layers[0].passes.KERNEL

    def writes_out(self) -> bool:
        """Whether `decoder.py` runs the layers, in the present state of the model (and of autocast)."""
        return self._written_out() is not None

    def _written_out(self) -> list[LayerParts] | None:
        return read_layers(self.base.base_model, self.recompute) if self._may_write_out else None

    def lanes_here(self) -> int:
        """How many rows are computed at once, in the present state of the model, where they are long enough."""
        device = self.base.get_input_embeddings().weight.device
        return (self.lanes or lanes_here(device)) if self.writes_out() else 1

    @property
    def _may_write_out(self) -> bool:
        """The written-out layers have one kernel a device, on a GPU "varlen"; another that was asked for is used."""
        on_gpu = self.base.get_input_embeddings().weight.is_cuda
        return self.layers == "auto" and (self.kernel == "varlen" or not on_gpu)

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        pair_plan: PairPlan | None = None,
        fused_lm_head: bool = True,
        only_log_probs: bool = False,
        **kwargs: object,
    ) -> FusedCausalLMOutput:
        """input_ids, attention_mask, labels: [2B, L] as TRL's DataCollatorForPreference makes them.

        only_log_probs: leave out the statistics, a tenth of a pass without gradients. So does the reference's pass
        of a training step by itself.
        """
        assert fused_lm_head, "the packed forward has no logits to return"
        routed = bool(kwargs.get("output_router_logits"))
        plan = pair_plan
        if plan is None or (routed and not plan.keeps_last):
            plan = plan_batch(input_ids, attention_mask, labels, keep_last=routed)
        if plan.slots.shape != (input_ids.shape[0], input_ids.shape[1] - 1):
            raise ValueError(
                f"the plan has {tuple(plan.slots.shape)} places but the batch is {tuple(input_ids.shape)}; "
                "plan the batch after it was padded"
            )
        # A model in training that takes no gradient is asked as the reference: TRL reads its log-probabilities alone.
        only_log_probs |= self.model.training and not torch.is_grad_enabled()
        scores, router_logits = self.entry_scores(plan, () if only_log_probs else self.statistics, routed)
        spread = {name: plan.scatter(value) for name, value in scores.items()}
        for name in set(STATISTICS) - set(scores) - {"log_sum_sq_probs"}:
            spread[name] = torch.zeros_like(spread["log_probs"], dtype=torch.bool if name == "is_top1" else None)
        aux_loss = None if router_logits is None else self._aux_loss(router_logits, plan)
        return FusedCausalLMOutput(label_mask=plan.slots < len(plan.head_labels), aux_loss=aux_loss, **spread)

    def entry_scores(
        self, plan: PairPlan, statistics: tuple[str, ...] = (), router_logits: bool = False
    ) -> tuple[dict[str, Tensor], tuple | None]:
        """Of each head entry [N] its log-probability and the statistics asked for, as `token_scores` gives them; and if
        asked, the routers' logits of a mixture of experts."""
        backbone, head, rule = self.base.base_model, self.base.get_output_embeddings(), self.rule
        layers = None if router_logits else self._written_out()
        if layers is None:
            hidden, logits = self._entry_states(plan, router_logits)
            return token_scores(hidden, head, plan.head_labels, rule, statistics), logits

        names = ("log_probs", *statistics)

        def score(row: PairPlan) -> tuple[Tensor, ...]:
            hidden = run_decoder(backbone, layers, row)[row.entry_rows]
            scores = token_scores(hidden, head, row.head_labels, rule, statistics)
            return tuple(scores[name] for name in names)

        values = score_in_lanes(score, plan, self.lanes or lanes_for(plan), self.model.parameters())
        return dict(zip(names, values, strict=True)), None

    def _entry_states(self, plan: PairPlan, router_logits: bool) -> tuple[Tensor, tuple | None]:
        """The last hidden state of each head entry [N, H] by the model's own layers, and if asked, the routers'
        logits."""
        kwargs = {"output_router_logits": True} if router_logits else {}
        with packed_rows(plan):
            out = self.base.base_model(
                input_ids=plan.input_ids, position_ids=plan.position_ids, use_cache=False, **kwargs
            )
        return out.last_hidden_state[0][plan.head_rows], getattr(out, "router_logits", None) if router_logits else None

    def _aux_loss(self, router_logits: tuple[Tensor, ...], plan: PairPlan) -> Tensor:
        """Load-balancing loss over the tokens stock sees: a shared token counts once for each of its
        sequences."""
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        config = self.text_config
        return load_balancing_loss_func(
            router_logits, config.num_experts, config.num_experts_per_tok, plan.token_weights()
        )

    def install(self) -> None:
        """Answer `model(..., fused_lm_head=True)` from packed rows, also through PEFT and DDP wrappers.

        Replaces the instance's forward, the same door TRL's own `add_fused_lm_head` uses; other calls
        (generation) reach what was there.
        """
        before, engine = self.base.forward, self

        @functools.wraps(before)
        def forward(_self: nn.Module, *args: object, fused_lm_head: bool = False, **kwargs: object):
            if not fused_lm_head:
                kwargs.pop("pair_plan", None)
                return before(*args, **kwargs)
            return engine(*args, fused_lm_head=True, **kwargs)

        self.base.forward = types.MethodType(forward, self.base)

        def restore() -> None:
            self.base.forward = before

        self._restore_forward = restore

    def detach(self) -> None:
        """Give the model back as it was."""
        if self._restore_forward is not None:
            self._restore_forward()
            self._restore_forward = None
        self._restore_attention()

"""What a run can be told: names, types and units. The values live in conf/, the rules between them in rules.py.

Every field is MISSING here, so that conf/ is the only place a value comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from dpo_lora.choices import (
    DataSource,
    Device,
    DType,
    Engine,
    ModelSource,
    Pairing,
    PlainText,
    Quantization,
    Retry,
    Schedule,
    TrackerKind,
    TrackerMode,
)


@dataclass
class ModelSettings:
    name: str = MISSING  # hub id, local folder, or the name an embedded model is known by
    source: ModelSource = MISSING  # where it is loaded from
    revision: str | None = MISSING  # branch, tag or commit; None: the default branch, pinned in run.json
    quantization: Quantization = MISSING  # of the base weights; the adapter is trained in float32 (QLoRA)
    attention: str = MISSING  # attn_implementation of transformers' own layers; see train.attention for packed rows
    trust_remote_code: bool = MISSING  # run code that comes with the model


@dataclass
class ColumnSettings:
    """The source's names for what we call so; None: by our name, or a known alias."""

    prompt: str | None = MISSING  # a text or messages
    chosen: str | None = MISSING  # the preferred answer
    rejected: str | None = MISSING  # the other answer
    system: str | None = MISSING  # the system turn
    tools: str | None = MISSING  # functions for the chat template
    responses: str | None = MISSING  # a list of answers
    scores: str | None = MISSING  # of the responses, in their order; higher is better
    id: str | None = MISSING  # by which a pair is named in results
    topic: str | None = MISSING  # results are also given by topic


@dataclass
class LintSettings:
    limits: dict[str, float | None] = MISSING  # share of rows by kind of finding above which training refuses
    length_bias: float = MISSING  # accuracy of "the longer answer wins", in [0.5, 1], from which it is a warning
    outlier: float = MISSING  # robust standard deviations of the log length beyond which a row is an outlier


@dataclass
class DataSettings:
    name: str = MISSING  # goes into the run directory's name
    source: DataSource = MISSING  # where the pairs come from
    path: str | None = MISSING  # file name in data/, file or folder path, or hub id; None where mix names them
    revision: str | None = MISSING  # hub only
    subset: str | None = MISSING  # hub configuration name
    split: str = MISSING  # training split; a shipped or local file's rows carry it in column "split"
    heldout_path: str | None = MISSING  # a second file of held-out pairs
    heldout_split: str | None = MISSING  # None: hold out heldout_share of the prompts
    heldout_share: float = MISSING  # in (0, 1), of distinct prompts
    max_pairs: int | None = MISSING  # training pairs kept, a seeded choice; None: all
    max_heldout: int | None = MISSING  # held-out pairs kept; None: all
    max_length: int = MISSING  # tokens of prompt + answer kept, from the start
    mix: list[dict[str, Any]] = MISSING  # several sources; each item sets path and what differs from the above
    columns: ColumnSettings = MISSING  # names of the source's columns
    filter: list[dict[str, Any]] = MISSING  # rules {column, op, value} that a row must all meet
    pairing: Pairing = MISSING  # which pairs a ranked or scored list of answers gives
    plain_text: PlainText = MISSING  # what becomes of prompts and answers that are texts, not messages
    near_duplicate: float | None = MISSING  # Jaccard similarity, in (0, 1], from which texts are near-duplicates
    drop: list[str] = MISSING  # kinds of finding whose rows are left out, besides the errors
    lint: LintSettings = MISSING  # thresholds of the findings


@dataclass
class LoraSettings:
    r: int = MISSING  # rank
    alpha: float = MISSING  # the update is scaled by alpha / r (alpha / sqrt(r) with rslora)
    dropout: float = MISSING  # probability on the adapter's input; > 0 turns the model's dropout on too
    targets: list[str] = MISSING  # module name endings, or the single word all-linear
    rslora: bool = MISSING  # rank-stabilised scaling
    dora: bool = MISSING  # weight-decomposed LoRA
    init: str = MISSING  # default or gaussian: both leave the base model as it is


@dataclass
class DpoSettings:
    """Field names are TRL's own."""

    loss_type: list[str] = MISSING  # TRL's losses; several are summed
    loss_weights: list[float] | None = MISSING  # one for each loss; None: 1
    beta: float = MISSING  # strength of the pull to the reference; tau for IPO
    label_smoothing: float = MISSING  # assumed share of flipped labels
    f_divergence_type: str = MISSING  # reverse_kl, forward_kl, js_divergence or alpha_divergence
    f_alpha_divergence_coef: float = MISSING  # alpha of alpha_divergence
    discopop_tau: float = MISSING  # temperature of the discopop loss
    ld_alpha: float | None = MISSING  # weight of tokens past the shorter answer's length, in [0, 1]
    use_weighting: bool = MISSING  # weigh pairs by their probability under the policy (WPO)


@dataclass
class TrainSettings:
    device: Device = MISSING  # what to train on
    dtype: DType = MISSING  # of the base weights and their products
    threads: int | None = MISSING  # CPU threads; None: one per physical core, as torch does
    epochs: float = MISSING  # passes over the training pairs
    max_steps: int | None = MISSING  # optimizer steps; beats epochs when set
    pairs_per_step: int = MISSING  # pairs per optimizer step: the batch size
    micro_batch: int | None = MISSING  # most pairs in memory at a time; None: tokens_per_batch decides
    tokens_per_batch: Any = MISSING  # most tokens in memory at a time; auto: found by trying
    engine: Engine = MISSING  # how a forward pass goes over pairs
    attention: str = MISSING  # kernel of the packed engine: auto, sdpa, block, varlen or flex
    reference_cache: bool = MISSING  # keep the reference's log-probabilities on disk, shared by all runs
    reference_cache_gb: float = MISSING  # GB; beyond it the entries unused for longest go
    learning_rate: float = MISSING  # at its peak
    schedule: Schedule = MISSING  # of the learning rate after the warmup
    warmup: float = MISSING  # share of all steps
    weight_decay: float = MISSING  # AdamW's
    max_grad_norm: float = MISSING  # the gradient is clipped to this norm
    optimizer: str = MISSING  # transformers' optimizer name
    gradient_checkpointing: Any = MISSING  # compute layers again in the backward pass: true, false; auto: when needed
    log_every: int = MISSING  # optimizer steps between rows of metrics.jsonl
    save_every: int = MISSING  # optimizer steps; 0: only when the run ends or is interrupted
    keep_checkpoints: int = MISSING  # newest checkpoints kept
    keep_best: str | None = MISSING  # held-out metric such as eval/accuracy: its best adapter is kept; None: the last
    patience: int | None = MISSING  # evaluations without a better keep_best before training stops; None: never
    deterministic: bool = MISSING  # refuse kernels whose result depends on the order of execution

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed again in the backward pass from the first step on."""
        return self.gradient_checkpointing is True


@dataclass
class EvalSettings:
    before: bool = MISSING  # score the held-out pairs before the first update
    every: int = MISSING  # optimizer steps; 0: only before and after
    batch: int = MISSING  # pairs in memory at a time, halved where they do not fit; the scores do not depend on it
    confidence: float = MISSING  # of every interval, in (0, 1)
    prompts: list[str] = MISSING  # user turns to answer before and after; empty: held-out prompts
    samples: int = MISSING  # held-out prompts to answer; 0: none
    sample_tokens: int = MISSING  # most tokens of an answer
    sample_each: bool = MISSING  # answer at every evaluation too, not only at the end
    report: bool = MISSING  # write report.html when the run ends, however it ends


@dataclass
class TrackingSettings:
    kind: TrackerKind = MISSING  # where metrics go besides the run's own files
    project: str = MISSING  # W&B project
    entity: str | None = MISSING  # W&B user or team; None: the account's default
    group: str | None = MISSING  # W&B group; None: the sweep's name
    tags: list[str] = MISSING  # W&B tags
    mode: TrackerMode = MISSING  # whether W&B uploads
    log_adapter: bool = MISSING  # upload the adapter as an artifact of the run


@dataclass
class SweepSettings:
    """How a sweep is run (-m); nothing here changes what a trial computes."""

    slots: int | None = MISSING  # trials at a time; None: per_gpu for each GPU, or one per CPU core
    per_gpu: int = MISSING  # trials that share one GPU
    trial_timeout: float | None = MISSING  # seconds one attempt may take; None: no limit
    grace: float = MISSING  # seconds a trial gets to write a checkpoint when it is told to stop
    retry: Retry = MISSING  # what an existing sweep does with its failed trials
    repeats: int = MISSING  # trials per setting, with seed, seed + 1, ...
    objectives: list[str] = MISSING  # the first one ranks; a study looks at all


@dataclass
class RunSettings:
    seed: int = MISSING  # of the split, the order of pairs, the adapter's start and sampled answers
    outputs: str = MISSING  # folder that runs are written into
    run_dir: str | None = MISSING  # this run's folder; None: outputs/dpo-<data>-lora-output-<unix seconds>
    parent: str | None = MISSING  # run directory or hub id of an adapter to go on from; it is the reference
    model: ModelSettings = MISSING
    data: DataSettings = MISSING
    lora: LoraSettings = MISSING
    dpo: DpoSettings = MISSING
    train: TrainSettings = MISSING
    eval: EvalSettings = MISSING
    tracking: TrackingSettings = MISSING
    sweep: SweepSettings = MISSING

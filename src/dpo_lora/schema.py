"""What a run can be told: names, types and units. The values live in conf/, the rules between them in rules.py.

Every field is MISSING here, so that conf/ is the only place a value comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING


class ModelSource(Enum):
    hub = "hub"  # a Hugging Face id, or a local folder in the same layout
    embedded = "embedded"  # the model that the package client fetches: no account, no hub


class Quantization(Enum):
    none = "none"
    int8 = "int8"  # LLM.int8(), bitsandbytes
    nf4 = "nf4"  # QLoRA's 4-bit NormalFloat with double quantisation, bitsandbytes


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DType(Enum):
    auto = "auto"  # bf16 on a GPU that has it, else fp32
    float32 = "float32"
    bfloat16 = "bfloat16"


class Engine(Enum):
    auto = "auto"  # packed where the model allows it and a probe proves it equal, else stock
    packed = "packed"  # refuse where it cannot be
    stock = "stock"  # TRL's own forward pass


class Schedule(Enum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"


class TrackerKind(Enum):
    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


class TrackerMode(Enum):
    auto = "auto"  # online when a key is known, else offline
    online = "online"
    offline = "offline"


class DataSource(Enum):
    shipped = "shipped"  # a file of data/
    local = "local"  # a file or folder of the user's: json, jsonl, csv, parquet, arrow
    hub = "hub"  # a data set id on the Hugging Face hub


class Pairing(Enum):
    """Which pairs a ranked or scored list of answers gives."""

    best_worst = "best_worst"
    best_rest = "best_rest"  # the best against each other one
    adjacent = "adjacent"  # each against the next lower one
    all = "all"  # every two that differ in rank


class PlainText(Enum):
    keep = "keep"  # as written: no chat template, as TRL does with text columns
    chat = "chat"  # the prompt becomes a user turn, the answers assistant turns


class Retry(Enum):
    none = "none"  # a failed trial stays failed
    failed = "failed"  # failed trials run again, from their last whole checkpoint


@dataclass
class ModelSettings:
    name: str = MISSING  # hub id, local folder, or the name an embedded model is known by
    source: ModelSource = MISSING
    revision: str | None = MISSING  # branch, tag or commit; None: the default branch, pinned in run.json
    quantization: Quantization = MISSING
    attention: str = MISSING  # transformers' attn_implementation
    trust_remote_code: bool = MISSING


@dataclass
class ColumnSettings:
    """The source's names for what we call so; None: by our name, or a known alias."""

    prompt: str | None = MISSING
    chosen: str | None = MISSING
    rejected: str | None = MISSING
    system: str | None = MISSING
    tools: str | None = MISSING
    responses: str | None = MISSING  # a list of answers
    scores: str | None = MISSING  # of the responses, in their order; higher is better
    id: str | None = MISSING
    topic: str | None = MISSING


@dataclass
class LintSettings:
    # Share of the rows, by kind of finding, above which training refuses; None: never.
    limits: dict[str, float | None] = MISSING
    length_bias: float = MISSING  # accuracy of "the longer answer wins", in [0.5, 1], from which it is a warning
    outlier: float = MISSING  # robust standard deviations of the log length beyond which a row is an outlier


@dataclass
class DataSettings:
    name: str = MISSING  # goes into the run directory's name
    source: DataSource = MISSING
    path: str | None = MISSING  # file name in data/, file or folder path, or hub id; None where mix names them
    revision: str | None = MISSING  # hub only
    subset: str | None = MISSING  # hub configuration name
    split: str = MISSING  # training split; a shipped or local file's rows carry it in column "split"
    heldout_path: str | None = MISSING  # a second file of held-out pairs
    heldout_split: str | None = MISSING  # None: hold out heldout_share of the prompts
    heldout_share: float = MISSING  # in (0, 1), of distinct prompts
    max_pairs: int | None = MISSING  # training pairs kept, a seeded choice; None: all
    max_heldout: int | None = MISSING
    max_length: int = MISSING  # tokens of prompt + answer kept, from the start
    mix: list[dict[str, Any]] = MISSING  # several sources; each item sets path and what differs from the above
    columns: ColumnSettings = MISSING
    filter: list[dict[str, Any]] = MISSING  # rules {column, op, value} that a row must all meet
    pairing: Pairing = MISSING
    plain_text: PlainText = MISSING
    near_duplicate: float | None = MISSING  # Jaccard similarity, in (0, 1], from which texts are near-duplicates
    drop: list[str] = MISSING  # kinds of finding whose rows are left out, besides the errors
    lint: LintSettings = MISSING


@dataclass
class LoraSettings:
    r: int = MISSING
    alpha: float = MISSING  # the update is scaled by alpha / r (alpha / sqrt(r) with rslora)
    dropout: float = MISSING  # probability on the adapter's input; > 0 turns the model's dropout on too
    targets: list[str] = MISSING  # module name endings, or the single word all-linear
    rslora: bool = MISSING
    dora: bool = MISSING
    init: str = MISSING  # default or gaussian: both leave the base model as it is


@dataclass
class DpoSettings:
    """Field names are TRL's own."""

    loss_type: list[str] = MISSING
    loss_weights: list[float] | None = MISSING
    beta: float = MISSING  # strength of the pull to the reference; tau for IPO
    label_smoothing: float = MISSING  # assumed share of flipped labels
    f_divergence_type: str = MISSING
    f_alpha_divergence_coef: float = MISSING
    discopop_tau: float = MISSING
    ld_alpha: float | None = MISSING  # weight of tokens past the shorter answer's length, in [0, 1]
    use_weighting: bool = MISSING  # WPO


@dataclass
class TrainSettings:
    device: Device = MISSING
    dtype: DType = MISSING
    threads: int | None = MISSING  # CPU threads; None: one per physical core, as torch does
    epochs: float = MISSING
    max_steps: int | None = MISSING  # optimizer steps; beats epochs when set
    pairs_per_step: int = MISSING  # pairs behind each optimizer step, over all devices
    micro_batch: int | None = MISSING  # most pairs in memory at a time on each device; None: tokens_per_batch decides
    tokens_per_batch: Any = MISSING  # most tokens in memory at a time; auto: found by trying
    engine: Engine = MISSING  # how a forward pass goes over pairs
    attention: str = MISSING  # kernel of the packed engine: auto, sdpa, block, varlen or flex
    reference_cache: bool = MISSING  # keep the reference's log-probabilities on disk, shared by all runs
    reference_cache_gb: float = MISSING  # GB; beyond it the entries unused for longest go
    learning_rate: float = MISSING
    schedule: Schedule = MISSING
    warmup: float = MISSING  # share of all steps
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    optimizer: str = MISSING  # transformers' optimizer name
    gradient_checkpointing: Any = MISSING  # compute layers again in the backward pass: true, false; auto: when needed
    log_every: int = MISSING  # optimizer steps
    save_every: int = MISSING  # optimizer steps; 0: only when the run ends or is interrupted
    keep_checkpoints: int = MISSING
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
    kind: TrackerKind = MISSING
    project: str = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    tags: list[str] = MISSING
    mode: TrackerMode = MISSING
    log_adapter: bool = MISSING  # upload the adapter as an artifact of the run


@dataclass
class SweepSettings:
    """How a sweep is run (-m); nothing here changes what a trial computes."""

    slots: int | None = MISSING  # trials at a time; None: per_gpu for each GPU, or one a CPU core
    per_gpu: int = MISSING  # trials that share one GPU
    trial_timeout: float | None = MISSING  # seconds one attempt may take; None: no limit
    grace: float = MISSING  # seconds a trial gets to write a checkpoint when it is told to stop
    retry: Retry = MISSING  # what an existing sweep does with its failed trials
    repeats: int = MISSING  # trials a setting, with seed, seed + 1, ...
    objectives: list[str] = MISSING  # the first one ranks; a study looks at all


@dataclass
class RunSettings:
    seed: int = MISSING
    outputs: str = MISSING  # folder that runs are written into
    run_dir: str | None = MISSING  # None: outputs/dpo-<data>-lora-output-<unix seconds>
    parent: str | None = MISSING  # run directory or hub id of an adapter to go on from; it is the reference
    model: ModelSettings = MISSING
    data: DataSettings = MISSING
    lora: LoraSettings = MISSING
    dpo: DpoSettings = MISSING
    train: TrainSettings = MISSING
    eval: EvalSettings = MISSING
    tracking: TrackingSettings = MISSING
    sweep: SweepSettings = MISSING

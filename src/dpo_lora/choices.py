"""Settings that are one of a few words, and what each word means."""

from __future__ import annotations

from enum import Enum


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
    auto = "auto"  # packed where the model allows it and a check at start finds it equal, else stock
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
    auto = "auto"  # chat where there is a column for the prompt and the model has a chat template, else keep
    keep = "keep"  # as written: no chat template, as TRL does with text columns
    chat = "chat"  # the prompt becomes a user turn, the answers assistant turns


class Retry(Enum):
    none = "none"  # a failed trial stays failed
    failed = "failed"  # failed trials run again, from their last whole checkpoint

"""A tiny random model and tiny pairs, made on the spot: tests need no network and take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference log-probabilities of tests stay out of the user's cache; the embedded model is shared with it."""
    if request.node.get_closest_marker("embedded") is None:
        monkeypatch.setenv("DPO_LORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and a byte-level ChatML tokenizer, as a local folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_pair(number: int) -> dict[str, object]:
    """A conversational pair whose sides differ in wording and length."""
    return {
        "id": f"pair-{number}",
        "topic": ("odd", "even")[number % 2 == 0],
        "prompt": [{"role": "user", "content": f"What is {number} plus {number}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {2 * number}." + " Sure." * (number % 3)}],
        "rejected": [{"role": "assistant", "content": "Who knows" + "?" * (1 + number % 5)}],
    }


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs as a JSON lines file without a split column."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(make_pair(n)) + "\n" for n in range(40)), encoding="utf-8")
    return file


@pytest.fixture
def tiny_overrides(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> list[str]:
    """A command line that trains in a second: add or replace as the test needs."""
    return [
        "model=hub",
        f"model.name={tiny_model}",
        "data=local",
        f"data.path={pairs_file}",
        "data.heldout_share=0.3",
        "train=cpu",
        "train.pairs_per_step=4",
        "train.micro_batch=4",
        "train.max_steps=4",
        "train.save_every=2",
        "tracking=none",
        f"outputs={tmp_path / 'outputs'}",
    ]


def dpo_lora(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dpo_lora", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
        timeout=300,
    )


class Outcome:
    """What a command line left: exit code, stdout, stderr and, where the last line names one, the run's directory."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def run(self) -> Path:
        assert self.code == 0, self.err
        return Path(self.out.strip().splitlines()[-1])


class CommandLine:
    """The real entry point with real arguments, in this process: imports are paid for once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *words: str) -> Outcome:
        from hydra.core.global_hydra import GlobalHydra

        from dpo_lora.__main__ import main

        GlobalHydra.instance().clear()
        self.monkeypatch.setattr(sys, "argv", ["dpo-lora", *words])
        self.capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out, err = self.capfd.readouterr()
        return Outcome(code, out, err)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capfd)

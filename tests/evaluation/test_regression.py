"""lm-evaluation-harness on a task whose data lie on this machine: base against adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import CommandLine, make_pair

TASK = """\
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Thirty questions with a right answer and a wrong one."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {
            "question": str(make_pair(n)["prompt"][0]["content"]),  # type: ignore[index]
            "choices": [f"It is {2 * n}.", "Who knows" + "?" * (1 + n % 5)],
        }
        for n in range(100, 130)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK.format(file=folder / "sums.jsonl"))
    return folder


def answers(run: Path, model_folder: Path, file: Path) -> dict[str, list[float]]:
    """How often each side gives the right answer the higher likelihood, by transformers and peft alone."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), run).eval()

    def logp(question: str, answer: str) -> float:
        prompt, whole = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in (question, f"{question} {answer}")
        )
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(float(logits[at - 1, whole[at]]) for at in range(len(prompt), len(whole)))

    found: dict[str, list[float]] = {"adapter": [], "base": []}
    for line in file.read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        right, wrong = row["choices"]
        found["adapter"].append(float(logp(row["question"], right) > logp(row["question"], wrong)))
        with model.disable_adapter():
            found["base"].append(float(logp(row["question"], right) > logp(row["question"], wrong)))
    return found


def test_base_and_adapter_are_asked_the_same(
    cli: CommandLine, tiny_overrides: list[str], tiny_model: Path, tasks: Path
) -> None:
    pytest.importorskip("lm_eval")
    run = cli("train", *tiny_overrides, "train.learning_rate=1e-2", "train.max_steps=12").run
    done = cli("regress", str(run), "--tasks", "sums", "--include", str(tasks))
    assert done.code == 0, done.err
    found = json.loads((run / "regress.json").read_text())
    [row] = found["rows"]
    truth = answers(run, tiny_model, tasks / "sums.jsonl")
    assert (row["task"], row["figure"], row["documents"]) == ("sums", "acc", 30)
    assert row["base"] == pytest.approx(np.mean(truth["base"]))
    assert row["adapter"] == pytest.approx(np.mean(truth["adapter"]))
    paired = row["paired"]
    assert paired["difference"] == pytest.approx(np.mean(truth["adapter"]) - np.mean(truth["base"]))
    assert paired["second_ahead"] == sum(a > b for a, b in zip(truth["adapter"], truth["base"], strict=True))
    assert paired["difference_interval"][0] <= paired["difference"] <= paired["difference_interval"][1]
    assert "beyond chance" in done.out
    assert paired["difference"] != 0, "a test on two sides that are one would show nothing"


def test_an_unknown_task_is_refused_with_its_neighbours(
    cli: CommandLine, tiny_overrides: list[str], tasks: Path
) -> None:
    pytest.importorskip("lm_eval")
    run = cli("train", *tiny_overrides).run
    done = cli("regress", str(run), "--tasks", "summs", "--include", str(tasks))
    assert done.code == 2
    assert "'sums'" in done.err


def test_without_the_harness_it_says_what_to_install(
    cli: CommandLine, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_lora.evaluation import regression

    run = cli("train", *tiny_overrides).run
    monkeypatch.setattr(regression.importlib.util, "find_spec", lambda name: None)
    done = cli("regress", str(run), "--tasks", "sums")
    assert done.code == 2
    assert "dpo-lora[regress]" in done.err

"""score, compare, samples and the choice of a checkpoint through the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_lora.checkpoints import at_step
from dpo_lora.evaluation import samples
from dpo_lora.evaluation.samples import repetition
from dpo_lora.files import read_jsonl
from dpo_lora.reports import terminal
from harness import CommandLine, make_pair

LEARNS = "train.learning_rate=1e-2"


def evaluation(run: Path) -> dict:
    return json.loads((run / "eval.json").read_text())


def test_score_reproduces_the_run(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    run = cli("train", *tiny_overrides, LEARNS).run
    assert cli("score", str(run), "--out", str(tmp_path / "again")).code == 0
    before, again = evaluation(run)["after"], evaluation(tmp_path / "again")["after"]
    for name, value in again.items():
        if isinstance(value, float):
            assert value == pytest.approx(before[name], abs=1e-6), name
    assert again["by_topic"][0]["accuracy_interval"] == before["by_topic"][0]["accuracy_interval"]


def test_a_child_is_scored_against_its_parent(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    parent = cli("train", *tiny_overrides, LEARNS).run
    child = cli("train", *tiny_overrides, LEARNS, f"parent={parent}").run
    assert cli("score", str(child), "--out", str(tmp_path / "again")).code == 0
    again, before = evaluation(tmp_path / "again")["after"], evaluation(child)["after"]
    assert again["margin"] == pytest.approx(before["margin"], abs=1e-6)


def test_other_pairs_are_read_as_the_runs_own(
    cli: CommandLine, tiny_overrides: list[str], pairs_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    texts = tmp_path / "texts.jsonl"
    asked = [
        {"asked": r["prompt"][-1]["content"], **{s: r[s][-1]["content"] for s in ("chosen", "rejected")}} for r in rows
    ]
    texts.write_text("".join(json.dumps({"id": n, **row}) + "\n" for n, row in enumerate(asked)))
    words = [w for w in tiny_overrides if not w.startswith("data.path")]
    words += [f"data.path={texts}", "data.columns={prompt: asked}", "data.plain_text=keep", "data.max_length=40"]
    run = cli("train", *words, LEARNS).run
    assert cli("score", str(run), "--data", str(texts), "--out", str(tmp_path / "all")).code == 0
    again = {row["id"]: row for row in read_jsonl(tmp_path / "all" / "eval_pairs.jsonl")}
    assert len(again) == len(rows)
    for row in read_jsonl(run / "eval_pairs.jsonl"):
        if row["step"] == 4:
            assert again[row["id"]]["tokens_chosen"] == row["tokens_chosen"]
            assert again[row["id"]]["margin"] == pytest.approx(row["margin"], abs=1e-6)


def test_an_adapter_that_rewrote_its_base_is_refused(
    cli: CommandLine, tiny_overrides: list[str], tiny_model: Path, pairs_file: Path
) -> None:
    run = cli("train", *tiny_overrides, LEARNS).run
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa_niter_4"}))
    for done in (
        cli("score", str(run), "--data", str(pairs_file), "--reference", str(tiny_model)),
        cli("train", *tiny_overrides, f"parent={run}"),
    ):
        assert done.code == 2
        assert "initialised by pissa_niter_4" in done.err


def test_an_adapter_folder_is_scored_on_any_file(
    cli: CommandLine, tiny_overrides: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    run = cli("train", *tiny_overrides, LEARNS).run
    (run / "settings.yaml").rename(run / "gone.yaml")  # now it is an adapter and no run of ours
    file = tmp_path / "others.jsonl"
    file.write_text("".join(json.dumps(make_pair(n)) + "\n" for n in range(100, 110)))
    out = tmp_path / "scored"
    done = cli("score", str(run), "--data", str(file), "--reference", str(tiny_model), "--out", str(out))
    assert done.code == 0, done.err
    assert evaluation(out)["after"]["pairs"] == 10
    assert evaluation(out)["after"]["accuracy"] > 0.8
    assert "no held-out pairs of its own" in cli("score", str(run), "--reference", str(tiny_model)).err


def test_a_whole_model_is_scored_against_its_reference(
    cli: CommandLine, tiny_overrides: list[str], tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = cli("train", *tiny_overrides, LEARNS).run
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "merged")
    out = tmp_path / "scored"
    words = ("--data", str(pairs_file), "--reference", str(tiny_model))
    assert cli("score", str(tmp_path / "merged"), *words, "--out", str(out)).code == 0
    assert cli("score", str(run), "--data", str(pairs_file), "--out", str(tmp_path / "adapter")).code == 0
    merged, adapter = evaluation(out)["after"], evaluation(tmp_path / "adapter")["after"]
    assert merged["margin"] == pytest.approx(adapter["margin"], abs=1e-5)


def test_a_run_cannot_be_told_from_itself(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = str(cli("train", *tiny_overrides, LEARNS).run)
    found = json.loads(cli("compare", run, run, "--json").out)["comparisons"][0]
    assert found["difference"] == 0
    assert found["margin_difference_nats_interval"] == [0, 0]
    assert found["mcnemar_p"] == 1
    assert not found["distinguishable"]
    assert "cannot be told apart" in cli("compare", run, run).out


def test_runs_that_decide_every_pair_alike_are_not_called_equal(cli: CommandLine, tiny_overrides: list[str]) -> None:
    """Two runs whose beta differs: what differs is named, and no difference seen is not called certainty."""
    runs = [str(cli("train", *tiny_overrides, f"dpo.beta={beta}", "eval.samples=0").run) for beta in (0.1, 0.5)]
    done = json.loads(cli("compare", *runs, "--json").out)
    assert done["settings"] == {"dpo.beta": ["0.1", "0.5"]}
    [found] = done["comparisons"]
    assert found["pairs"] == evaluation(Path(runs[0]))["after"]["pairs"]
    assert not found["distinguishable"]
    alike = {**found, "second_ahead": 0, "first_ahead": 0, "pairs": 8, "margin_difference_nats_interval": [-2.0, -1.0]}
    said = terminal.verdict(alike)
    assert "cannot be told apart" in said
    assert "up to 31.2%" in said, "1 - 0.05 ** (1 / 8)"
    assert "margins do differ beyond chance" in said


def test_a_trained_run_is_told_from_one_that_learned_the_opposite(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Same prompts and pairs held out; one of the two learned from swapped training pairs."""
    held = [{**make_pair(n), "split": "heldout"} for n in range(30)]
    files = []
    for name, swap in (("right", False), ("wrong", True)):
        rows = [{**make_pair(n), "split": "train"} for n in range(30, 60)]
        if swap:
            rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in held + rows))
    right, wrong = (
        str(cli("train", *tiny_overrides, LEARNS, f"data.path={file}", "data.heldout_split=heldout").run)
        for file in files
    )
    done = json.loads(cli("compare", wrong, right, "--json").out)
    [found] = done["comparisons"]
    assert found["pairs"] == 30
    assert found["distinguishable"]
    assert found["difference"] > 0.5
    assert list(done["settings"]) == ["data.path"]


def test_the_best_checkpoint_is_kept_and_training_stops_early(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = cli(
        "train", *tiny_overrides, "train.learning_rate=1", "train.schedule=constant", "train.max_steps=40",
        "train.max_grad_norm=1000", "eval.every=1", "train.save_every=0", "train.keep_checkpoints=1",
        "train.keep_best=eval/loss", "train.patience=3",
    ).run  # fmt: skip
    found = evaluation(run)
    losses = {row["step"]: row["loss"] for row in found["history"] if row["step"] > 0}
    best = min(losses, key=lambda step: (losses[step], step))
    assert found["after"]["step"] == found["best"]["step"] == best
    assert max(losses) == best + 3 < 40
    assert at_step(run / "checkpoints", best).is_dir()
    again = run.parent / "again"
    assert cli("score", str(run), "--out", str(again)).code == 0
    assert evaluation(again)["after"]["loss"] == pytest.approx(losses[best], abs=1e-6), "the saved adapter is the best"
    assert {row["step"] for row in read_jsonl(run / "samples.jsonl")} == {best}


def test_held_out_rows_leave_the_averages_of_training_alone(cli: CommandLine, tiny_overrides: list[str]) -> None:
    words = (*tiny_overrides, LEARNS, "train.max_steps=6", "eval.samples=0")
    each = cli("train", *words, "train.log_every=1").run
    third = cli("train", *words, "train.log_every=3", "eval.every=2").run
    steps = [row for row in read_jsonl(each / "metrics.jsonl") if "loss" in row]
    logged = [row for row in read_jsonl(third / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in logged] == [3, 6]
    for row in logged:
        of = [s for s in steps if row["step"] - 3 < s["step"] <= row["step"]]
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert row[name] == pytest.approx(sum(s[name] for s in of) / 3, rel=1e-4), name
    evaluations = [row for row in read_jsonl(third / "metrics.jsonl") if "eval/loss" in row]
    assert len(evaluations) == 4
    assert not any("rewards/margins" in row for row in evaluations)


def test_answers_of_a_step_are_taken_once(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = cli(
        "train", *tiny_overrides, "train.learning_rate=1", "train.schedule=constant", "train.max_steps=6",
        "train.max_grad_norm=1000", "eval.every=2", "train.keep_best=eval/loss", "eval.sample_each=true",
        "eval.samples=2", "eval.sample_tokens=4",
    ).run  # fmt: skip
    best = evaluation(run)["best"]["step"]
    assert best < 6, "the last evaluation is not the best here"
    rows = [(row["step"], row["id"], row["decoding"]) for row in read_jsonl(run / "samples.jsonl")]
    assert len(rows) == len(set(rows)) == 3 * 4
    assert evaluation(run)["samples"]["step"] == best


def test_answers_that_do_not_fit_are_asked_for_fewer_at_a_time(
    cli: CommandLine, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    words = (*tiny_overrides, LEARNS, "eval.samples=3", "eval.sample_tokens=4")
    whole = list(read_jsonl(cli("train", *words).run / "samples.jsonl"))
    continuations, fit = samples.continuations, [2]

    def cramped(model, *, prompts, **rest):
        if len(prompts) > 2 * fit[0]:  # greedy and sampled
            raise torch.OutOfMemoryError("there is no more")
        return continuations(model, prompts=prompts, **rest)

    monkeypatch.setattr(samples, "continuations", cramped)
    cut = list(read_jsonl(cli("train", *words).run / "samples.jsonl"))
    greedy = [[(row["id"], row["policy"]) for row in rows if row["decoding"] == "greedy"] for rows in (whole, cut)]
    assert greedy[0] == greedy[1]
    assert [row["decoding"] for row in cut] == ["greedy"] * 3 + ["sampled"] * 3
    fit[0] = 0
    done = cli("train", *words)
    assert (done.run / "adapter_model.safetensors").is_file()
    assert not (done.run / "samples.jsonl").exists()
    assert "Not even one sampled answer fits" in (done.run / "train.log").read_text()


def test_samples_are_seeded_and_side_by_side(cli: CommandLine, tiny_overrides: list[str]) -> None:
    words = (*tiny_overrides, LEARNS, "eval.prompts=[Why?,How?]", "eval.sample_tokens=12")
    runs = [cli("train", *words).run for _ in range(2)]
    first, second = (list(read_jsonl(run / "samples.jsonl")) for run in runs)
    assert first == second
    assert [row["decoding"] for row in first] == ["greedy", "greedy", "sampled", "sampled"]
    assert all(row["kl"]["sum"] >= 0 for row in first if row["kl"])
    assert evaluation(runs[0])["samples"]["kl_per_token"] > 0
    assert repetition("a b c a b c") == pytest.approx(1 / 4)


def test_greedy_samples_are_what_the_library_generates(
    cli: CommandLine, tiny_overrides: list[str], tiny_model: Path
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = cli("train", *tiny_overrides, LEARNS, "eval.sample_tokens=10").run
    tokenizer = AutoTokenizer.from_pretrained(run)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run).eval()
    for row in read_jsonl(run / "samples.jsonl"):
        if row["decoding"] == "greedy":
            ids = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                said = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
            assert row["policy"]["text"] == tokenizer.decode(said, skip_special_tokens=True).strip()


def test_sampling_does_not_move_the_training(cli: CommandLine, tiny_overrides: list[str]) -> None:
    from safetensors.torch import load_file

    words = (*tiny_overrides, LEARNS, "eval.every=1", "lora.dropout=0.1")
    a = cli("train", *words, "eval.samples=0").run
    b = cli("train", *words, "eval.sample_each=true", "eval.sample_tokens=4").run
    left, right = (load_file(run / "adapter_model.safetensors") for run in (a, b))
    assert all((left[name] == right[name]).all() for name in left)

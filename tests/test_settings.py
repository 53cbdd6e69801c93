"""The strict door: every way to mistype a setting stops, and says what was meant."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import pytest
import trl
from trl.trainer import dpo_trainer

from dpo_lora import __main__, rules
from dpo_lora.schema import DpoSettings, RunSettings
from dpo_lora.settings import fingerprint, from_plain, plain, setting_names
from harness import ROOT, CommandLine, dpo_lora

TYPOS = [
    (["dpo.betta=1"], "dpo.beta"),
    (["betta=1"], "dpo.beta"),
    (["+dpo.betta=1"], "dpo.beta"),
    (["++dpo.betta=1"], "dpo.beta"),
    (["+learning_rate=1"], "train.learning_rate"),
    (["lora=al-linear"], "all-linear"),
    (["modle=llama-3.2-1b"], "model"),
    (["experiment=smok"], "smoke"),
    (["dpo.beta=strong"], "dpo.beta"),
    (["train.device=gpu"], "train.device"),
    (["~dpo.beta"], "dpo.beta"),
    (["data=local"], "data.path"),
    (["model=hub"], "model.name"),
    (["dpo.loss_type=[sigmod]"], "'sigmoid'"),
    (["dpo.f_divergence_type=kl"], "reverse_kl"),
    (["dpo=nca", "dpo.f_divergence_type=forward_kl"], "nca_pair"),
    (["dpo=aot", "dpo.use_weighting=true"], "aot"),
    (["dpo.beta"], "dpo.beta"),
    (["dpo.beta=0.1,0.2"], "add -m"),
    (["-m", "dpo.beta=0.1,0.2", "--cfg", "job"], "Only one of"),
]


@pytest.mark.parametrize(("words", "meant"), TYPOS, ids=[" ".join(t[0]) for t in TYPOS])
def test_a_typo_is_refused_with_what_was_meant(cli: CommandLine, tmp_path: Path, words: list[str], meant: str) -> None:
    outcome = cli("train", f"outputs={tmp_path}", *words)
    assert outcome.code == 2
    assert meant in outcome.err
    assert "Traceback" not in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_typo_in_a_users_own_preset_is_refused(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo" / "mine.yaml").write_text("defaults: [sigmoid, _self_]\nbetta: 0.3\n")
    outcome = cli("train", "--config-dir", str(tmp_path), "dpo=mine", f"outputs={tmp_path / 'outputs'}")
    assert outcome.code == 2
    assert "betta" in outcome.err
    assert not (tmp_path / "outputs").exists()


BROKEN = [
    ("lora.r=0", "rank"),
    ("lora.dropout=1.5", "[0, 1)"),
    ("lora.alpha=-1", "above 0"),
    ("dpo.beta=-0.1", "above 0"),
    ("dpo.loss_weights=[1,2]", "one weight"),
    ("dpo.label_smoothing=0.7", "[0, 0.5)"),
    ("dpo.ld_alpha=2", "[0, 1]"),
    ("data.heldout_share=1.5", "between 0 and 1"),
    ("data.name=../escape", "folder's name"),
    ("train.pairs_per_step=0", "at least 1"),
    ("train.learning_rate=0", "above 0"),
    ("train.warmup=1", "[0, 1)"),
    ("eval.confidence=95", "0.95"),
    ("model.quantization=nf4", "embedded"),
]


@pytest.mark.parametrize(("word", "why"), BROKEN)
def test_a_value_that_cannot_train_is_refused_before_anything_is_written(
    cli: CommandLine, tmp_path: Path, word: str, why: str
) -> None:
    outcome = cli("train", word, f"outputs={tmp_path / 'outputs'}")
    assert outcome.code == 2
    assert word.partition("=")[0] in outcome.err
    assert why in outcome.err
    assert not (tmp_path / "outputs").exists()


HEAVY = """
import sys
from dpo_lora.__main__ import main
sys.argv = ["dpo-lora", *{words}]
try:
    main()
except SystemExit:
    pass
heavy = {{"torch", "transformers", "trl", "peft", "datasets", "wandb"}} & sys.modules.keys()
assert not heavy, heavy
"""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "dpo.betta=1"]], ids=" ".join)
def test_help_and_typos_import_nothing_heavy(words: list[str]) -> None:
    """What makes them answer in under a second; the seconds themselves depend on the machine."""
    code = HEAVY.format(words=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_lists_groups_and_settings() -> None:
    done = dpo_lora("train", "--help")
    assert done.returncode == 0
    for word in ("sigmoid-norm", "smollm2-135m", "learning_rate", "--cfg job --resolve", 'eval "$(dpo-lora'):
        assert word in done.stdout


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    """As `dpo-lora train --help | head` does."""
    words = [sys.executable, "-m", "dpo_lora", "train", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 141)


def test_another_broken_pipe_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> None:
        raise BrokenPipeError("a worker's")

    monkeypatch.setattr(__main__, "_command", breaks)
    with pytest.raises(BrokenPipeError, match="a worker's"):
        __main__.main()
    monkeypatch.setattr(__main__, "_command", lambda: None)
    monkeypatch.setattr(sys, "stdout", None)  # as of `>&-`
    __main__.main()


def test_help_shows_the_run_at_hand_and_presets_of_ones_own(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ours.yaml").write_text("defaults: [explainer, _self_]\nname: ours\n")
    outcome = cli("train", "--help", "--config-dir", str(tmp_path), "data=ours", "dpo.beta=0.37")
    assert outcome.code == 0, outcome.err
    assert "data: explainer, hh-rlhf, local, mix, orca-dpo, ours, small-talk, ultrafeedback" in outcome.out
    assert "name: ours" in outcome.out
    assert "beta: 0.37" in outcome.out


def test_help_refuses_a_typo_as_a_run_would(cli: CommandLine) -> None:
    outcome = cli("train", "--help", "dpo=sigmod")
    assert outcome.code == 2
    assert "Did you mean 'sigmoid'" in outcome.err


def test_cfg_job_prints_the_seeds_run(cli: CommandLine) -> None:
    outcome = cli("train", "experiment=dpo-explainer-lora", "--cfg", "job", "--resolve")
    assert outcome.code == 0
    assert "meta-llama/Llama-3.2-1B-Instruct" in outcome.out
    assert "explainer.jsonl" in outcome.out


def _leaves(schema: type = RunSettings, group: str = "") -> list[tuple[str, str]]:
    hints = get_type_hints(schema)
    found = []
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            found += _leaves(hints[field.name], field.name)
        else:
            found.append((group, field.name))
    return found


READ_WHOLE = {"columns"}  # preferences walks over its fields by name
ROOM_PARTS = {"evaluation": "eval", "sweeps": "sweep"}


def test_every_setting_is_read_by_some_line() -> None:
    """A setting that only the schema and its rules name would be a promise nobody keeps."""
    read = set()
    for file in (ROOT / "src" / "dpo_lora").rglob("*.py"):
        if file.name in ("schema.py", "rules.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                # These call their part "settings"; elsewhere it goes by its group's name.
                part = {"lora": "lora", "model": "model"}.get(file.stem) or ROOM_PARTS.get(file.parent.name)
                read.add((part if name == "settings" and part else name, node.attr))
    unread = []
    for group, field in _leaves():
        if group in READ_WHOLE:
            assert any(attr == group for _, attr in read)
            continue
        # A room names its part after the group, or "settings"; the whole is run, settings or self.run.
        owners = {group} if group else {"settings", "run"}
        if not owners & {owner for owner, attr in read if attr == field}:
            unread.append(f"{group}.{field}")
    assert not unread


def test_loss_settings_are_trls_own_names() -> None:
    upstream = {f.name for f in dataclasses.fields(trl.DPOConfig)}
    assert {f.name for f in dataclasses.fields(DpoSettings)} <= upstream


def test_losses_and_divergences_are_those_that_trl_has() -> None:
    """TRL keeps the names in its loss code alone: compared with are the strings that its branches test for."""
    tree = ast.parse(Path(dpo_trainer.__file__).read_text())
    tested: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
            left, right = ast.unparse(node.left), node.comparators[0]
            if isinstance(right, ast.Constant) and isinstance(right.value, str):
                tested.setdefault(left, set()).add(right.value)
    assert set(rules.LOSSES) == tested["loss_type"]
    assert set(rules.DIVERGENCES) == tested["self.f_divergence_type"]


def test_setting_names_reach_every_leaf() -> None:
    names = setting_names()
    assert {"dpo", "dpo.beta", "train.pairs_per_step", "seed"} <= set(names)
    assert len(names) == len(set(names))


def test_plain_and_back_is_the_same(some_settings: RunSettings) -> None:
    assert from_plain(plain(some_settings)) == some_settings


def test_the_fingerprint_names_what_is_computed_and_nothing_else(some_settings: RunSettings) -> None:
    base = fingerprint(some_settings)
    same = from_plain({**plain(some_settings), "outputs": "elsewhere"})
    assert fingerprint(same) == base
    values = plain(some_settings)
    values["dpo"]["beta"] = 0.2
    assert fingerprint(from_plain(values)) != base
    assert len(base) == 16


@pytest.fixture
def some_settings() -> RunSettings:
    return compose()


def compose(*overrides: str) -> RunSettings:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from dpo_lora import train  # noqa: F401  # registers schema and resolvers
    from dpo_lora.resources import conf_dir
    from dpo_lora.settings import from_hydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return from_hydra(hydra_compose("config", overrides=list(overrides)))


GROUPS = ("model", "data", "lora", "dpo", "train", "eval", "tracking", "experiment")
PRESETS = sorted((group, file.stem) for group in GROUPS for file in (ROOT / "conf" / group).glob("*.yaml"))
# What a preset leaves to its user.
NEEDED = {
    ("data", "local"): ["data.path=pairs.jsonl"],
    ("data", "mix"): ["data.mix=[{path: pairs.jsonl}]"],
    ("model", "hub"): ["model.name=OWNER/NAME"],
}


@pytest.mark.parametrize(("group", "name"), PRESETS, ids=["/".join(p) for p in PRESETS])
def test_every_preset_composes(group: str, name: str) -> None:
    needed = NEEDED.get((group, name), [])
    assert compose(f"{group}={name}", *needed).seed == 0


def test_the_presets_that_people_ask_for_are_there() -> None:
    assert {g for g, _ in PRESETS} == set(GROUPS)
    wanted = {
        "model": "smollm2-135m llama-3.2-1b llama-3.2-3b llama-3.1-8b qwen3-0.6b qwen3-4b gemma-3-1b hub",
        "data": "explainer small-talk ultrafeedback hh-rlhf orca-dpo local",
        "lora": "attention all-linear rslora dora",
        "dpo": "sigmoid ipo hinge robust apo-zero apo-down nca bco sppo aot discopop exo sigmoid-norm mpo",
        "train": "auto cpu gpu",
        "tracking": "wandb tensorboard none",
        "experiment": "smoke overfit dpo-explainer-lora",
    }
    for group, names in wanted.items():
        assert {(group, name) for name in names.split()} <= set(PRESETS)


def test_no_preset_runs_code() -> None:
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert "_target_" not in file.read_text(), file


def test_a_sweep_reads_one_second() -> None:
    from omegaconf import OmegaConf

    from dpo_lora import train  # noqa: F401

    config = OmegaConf.create({"a": "${unix_seconds:}"})
    first = config.a
    time.sleep(1.1)
    assert config.a == first

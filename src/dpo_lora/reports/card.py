"""The model card at a run directory's root, written from the run's files alone."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dpo_lora.files import write_atomic
from dpo_lora.rundir import RunDir

_TEMPLATES = Path(__file__).parent / "templates"
_ESCAPED = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]<>#|!"})
# An absolute path in a word of a command line: all of it, a value, or one in a list or mapping; in quotes or not.
_PATH = re.compile(r"""((?:^|[=:,\[{(])\s*)(?:(['"])((?:file://)?/(?!/).*?)\2|((?:file://)?/(?!/)[^,\]})'"]*))""")


def write(run: RunDir) -> None:
    """Write ``README.md`` into ``run``."""
    write_atomic(run.card_file, render(run))


def render(run: RunDir, hub_id: str | None = None, hub_base: str | None = None) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        hub_id: the id the adapter will have on the hub; the quick start then names it instead of
            the run's directory, and links to folders of this machine are left out.
        hub_base: the id of the base model there; None: the name the run has for it.
    """
    manifest, settings = run.manifest(), run.settings()
    evaluation = json.loads(run.eval_file.read_text(encoding="utf-8")) if run.eval_file.exists() else None
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["escape_markdown"] = lambda text: str(text).translate(_ESCAPED)
    name = hub_id.rsplit("/", 1)[-1] if hub_id else run.path.name
    base = manifest["reference"]["base"] | ({"name": hub_base} if hub_base else {})
    parent = manifest.get("parent")
    return environment.get_template("card.md.j2").render(
        front_matter=_front_matter(name, base, manifest["data"], evaluation),
        name=name,
        base=base,
        model=repr(hub_id or str(run.path)),
        manifest=manifest,
        parent_link=None if parent is None or (hub_id and "://" not in parent["link"]) else parent["link"],
        settings=settings,
        evaluation=evaluation,
        losses=", ".join(settings["dpo"]["loss_type"]),
        data=", ".join(_sources(manifest["data"], is_public=bool(hub_id))),
        command=shlex.join([_shown(word) for word in manifest["command"]] if hub_id else manifest["command"]),
        steps=manifest.get("training", {}).get("steps"),
        question=_QUESTIONS.get(settings["data"]["name"], _QUESTIONS["explainer"]),
    )


def _shown(word: str) -> str:
    """A word of a command line without this machine's folders: ``data.path=/home/me/p`` becomes ``data.path=p``."""

    def named(found: re.Match[str]) -> str:
        before, quote, quoted, bare = found.groups(default="")
        return f"{before}{quote}{Path(quoted or bare).name}{quote}"

    return _PATH.sub(named, word)


def _sources(data: dict[str, Any], *, is_public: bool) -> list[str]:
    """Where the pairs come from, each place once: a mix has several, and a held-out file is one more."""
    found = []
    for source in data["sources"]:
        at = source["commit"] or source["revision"]
        place = _shown(source["path"]) if is_public else source["path"]
        found.append(place + (f" at {at}" if at else ""))
    return [*dict.fromkeys(found)]


def _on_the_hub(data: dict[str, Any]) -> list[str]:
    """Ids of the hub's data sets among the sources."""
    return [*dict.fromkeys(source["path"] for source in data["sources"] if source["source"] == "hub")]


_QUESTIONS = {
    "explainer": "Why is the sky blue? Explain it to a ten-year-old.",
    "small-talk": "Hi! I finally finished my first marathon today.",
}


def _front_matter(name: str, base: dict[str, Any], data: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    values: dict[str, Any] = {
        "base_model": base["name"],
        "library_name": "peft",
        "model_name": name,
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "lora", "trl", "peft", "transformers", "generated_from_trainer"],
    }
    stated = base.get("license") or {}
    values |= {"license": stated} if isinstance(stated, str) else stated  # runs of an earlier version have one word
    if ids := _on_the_hub(data):
        values["datasets"] = ids
    if evaluation is not None:
        values["model-index"] = _model_index(name, data, evaluation)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()


def _model_index(name: str, data: dict[str, Any], evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The exact held-out figures, in the form that the hub reads and shows."""
    after = evaluation["after"]
    low, high = after["accuracy_interval"]
    level = f"{100 * evaluation['confidence']:g} %"
    metrics = [
        {
            "type": "accuracy",
            "name": f"Held-out preference accuracy ({level} interval {low:.4f} to {high:.4f}, {after['pairs']} pairs)",
            "value": after["accuracy"],
        },
        {"type": "reward_margin", "name": "Mean held-out reward margin", "value": after["margin"]},
        {"type": "loss", "name": "Held-out DPO loss", "value": after["loss"]},
    ]
    if after["accuracy_length_controlled"] is not None:
        controlled = after["accuracy_length_controlled"]
        metrics.append({"type": "accuracy", "name": "Length-controlled held-out accuracy", "value": controlled})
    return [
        {
            "name": name,
            "results": [
                {
                    "task": {"type": "text-generation", "name": "Preference ranking"},
                    "dataset": {
                        "name": data["name"],
                        "type": data["path"] if data["source"] == "hub" else data["name"],  # a mix has no id
                        "split": "held out",
                    },
                    "metrics": metrics,
                }
            ],
        }
    ]

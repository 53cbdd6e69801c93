"""The model card at a run directory's root, written from the run's files alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dpo_lora.files import write_atomic
from dpo_lora.rundir import RunDir

_TEMPLATES = Path(__file__).parent / "templates"
_ESCAPED = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]<>#|!"})


def write(run: RunDir, hub_id: str | None = None) -> None:
    """Write ``README.md`` into ``run``.

    Args:
        hub_id: the id the adapter will have on the hub; the quick start then names it instead of
            the run's directory.
    """
    write_atomic(run.card_file, render(run, hub_id))


def render(run: RunDir, hub_id: str | None = None) -> str:
    """The card as Markdown with YAML front matter."""
    manifest, settings = run.manifest(), run.settings()
    evaluation = json.loads(run.eval_file.read_text(encoding="utf-8")) if run.eval_file.exists() else None
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["escape_markdown"] = lambda text: str(text).translate(_ESCAPED)
    name = hub_id.rsplit("/", 1)[-1] if hub_id else run.path.name
    base = manifest["reference"]["base"]
    return environment.get_template("card.md.j2").render(
        front_matter=_front_matter(name, manifest),
        name=name,
        base=base,
        model=repr(hub_id or str(run.path)),
        manifest=manifest,
        settings=settings,
        evaluation=evaluation,
        losses=", ".join(settings["dpo"]["loss_type"]),
        command=shlex.join(manifest["command"]),
        steps=manifest.get("training", {}).get("steps"),
        question=_QUESTIONS.get(settings["data"]["name"], _QUESTIONS["explainer"]),
    )


_QUESTIONS = {
    "explainer": "Why is the sky blue? Explain it to a ten-year-old.",
    "small-talk": "Hi! I finally finished my first marathon today.",
}


def _front_matter(name: str, manifest: dict[str, Any]) -> str:
    base = manifest["reference"]["base"]
    values: dict[str, Any] = {
        "base_model": base["name"],
        "library_name": "peft",
        "model_name": name,
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "lora", "trl", "peft", "transformers", "generated_from_trainer"],
    }
    if base.get("license"):
        values["license"] = base["license"]
    if manifest["data"]["source"] == "hub":
        values["datasets"] = [manifest["data"]["path"]]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()

"""HTML pages that need nothing but themselves: no network, no second file, nothing from data that acts."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
# What the page may do: its own styles and its own one script, by hash. A script that came in with
# data would be refused by the browser even if it got past the escaping.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def render(template: str, **values: Any) -> str:
    """A page from ``templates/``; every value is escaped unless a drawing made it.

    Args:
        template: a file name there.
        values: what the template names.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": _share, "signed": _signed, "link": safe_link}
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=_POLICY.format(script=digest),
        **values,
    )


def shown(text: object, most: int = 4000) -> str:
    """Text of unknown origin, fit for a page: no control characters, and cut where it would drown the rest."""
    clean = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))
    return clean if len(clean) <= most else f"{clean[:most]} … ({len(clean) - most} more characters)"


def safe_link(address: object) -> str | None:
    """``address`` if a page may link to it: web addresses and relative paths, never javascript: or data:."""
    text = str(address)
    if text.startswith(("https://", "http://")):
        return text
    return text if re.fullmatch(r"(\.{0,2}/)*[\w.][\w./ -]*", text) and ":" not in text else None


def _share(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:+.4f}"

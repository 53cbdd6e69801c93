"""Conversations written out as one text: Anthropic's Human/Assistant form, and rendered ChatML."""

from __future__ import annotations

import re

from dpo_lora.preferences.shapes.pair import Message

_HH = re.compile(r"(?:^|\n\n)(Human|Assistant|System): ?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL)


def is_hh(text: object) -> bool:
    """Whether a text is a transcript in the Human/Assistant form."""
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def hh(text: str) -> list[Message]:
    """The turns of a Human/Assistant transcript; an unfinished last turn has an empty content.

    The surrounding blanks of a turn belong to the form, not to what was said.
    """
    parts = _HH.split(text.strip("\n") if text.startswith("\n") else text)
    return [
        {"role": _HH_ROLES[role], "content": said.strip()} for role, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def is_chatml(text: object) -> bool:
    """Whether a text is a conversation that was put through a ChatML template already."""
    return isinstance(text, str) and text.lstrip().startswith("<|im_start|>") and bool(_CHATML.match(text.lstrip()))


def chatml(text: str) -> list[Message]:
    """The turns of a rendered ChatML conversation."""
    return [{"role": role, "content": said} for role, said in _CHATML.findall(text)]

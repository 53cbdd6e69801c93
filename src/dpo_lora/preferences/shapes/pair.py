"""What a pair is, and how messages and texts of any make become its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]  # role and content, and what else the chat template reads (tool_calls, name, ...)
Turns = str | list[Message]  # plain text, or a conversation

ROLES = ("system", "developer", "user", "assistant", "tool")

_ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}


class ShapeError(ValueError):
    """A row does not have the shape its source was recognised by; says how. The caller knows the place."""


@dataclass(slots=True)
class Pair:
    """Prompt and answers, all three plain text or all three lists of messages."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    tools: list[dict[str, Any]] | None = None
    scores: tuple[float, float] | None = None  # of chosen and rejected, where the source tells them


def messages(value: Any, what: str, default_role: str) -> list[Message]:
    """``value`` as messages: a list of them, one of them, or a text said by ``default_role``.

    Raises:
        ShapeError: it is none of these, or holds more than text.
    """
    if value is None:
        return [{"role": default_role, "content": ""}]
    if isinstance(value, str):
        return [{"role": default_role, "content": value}]
    if isinstance(value, dict):
        return [message(value, what, default_role)]
    if isinstance(value, list):
        return [message(v, what, default_role) for v in value]
    raise ShapeError(f"{what} is {_kind(value)}, where a text or a list of messages belongs")


def message(value: Any, what: str, default_role: str) -> Message:
    """One message, in OpenAI's (role, content) or ShareGPT's (from, value) naming."""
    if not isinstance(value, dict):
        raise ShapeError(f"{what} holds {_kind(value)}, where a message ({{role, content}}) belongs")
    role = value.get("role") or value.get("from") or default_role
    content = next((value[key] for key in ("content", "value", "text") if key in value), None)
    named = {"role": _ROLE_NAMES.get(str(role).lower(), str(role)), "content": _content(content, what)}
    read = ("role", "from", "content", "value", "text")
    return named | {k: v for k, v in value.items() if k not in read and k in _CARRIED and v is not None}


# What chat templates read besides role and content. Other keys (ids, scores, weights) are left out.
_CARRIED = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


def _content(content: Any, what: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type", "text") == "text" for p in content):
        return "".join(text(p.get("text"), what) for p in content)
    if isinstance(content, list):
        raise ShapeError(f"{what} holds images or sounds; only text can be trained")
    raise ShapeError(f"{what} holds a message whose content is {_kind(content)}, not a text")


def text(value: Any, what: str) -> str:
    """``value`` as a text; null is the empty text, which lint finds.

    Raises:
        ShapeError: it is something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ShapeError(f"{what} is {_kind(value)}, where a text belongs")
    return value


def number(value: Any, what: str) -> float | None:
    """``value`` as a number; None where there is none ("N/A", null)."""
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        if isinstance(value, str) and value.strip().lower() in ("", "n/a", "na", "none", "null"):
            return None
        raise ShapeError(f"{what} is {_kind(value)} ({value!r}), where a number belongs") from error


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def common_start(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages both conversations begin with; at least one is left to each as its answer."""
    most = min(len(chosen), len(rejected)) - 1
    for n in range(max(most, 0)):
        if chosen[n] != rejected[n]:
            return n
    return max(most, 0)

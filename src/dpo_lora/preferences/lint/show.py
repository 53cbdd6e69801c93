"""Pairs as they are trained: every token, in colour, with the loss mask."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

_COLOURS = {"prompt": "dim", "chosen": "green", "rejected": "red"}


def show(row: dict[str, Any], tokenizer: Any, console: Console) -> None:
    """Print one tokenised pair.

    Tokens are parted by bars. Those under which ``=`` stands are in the loss; ``.`` marks the prompt's, which only
    are read. Control tokens are reversed, so that the end of a turn can be seen.
    """
    parts: list[Text | Panel] = [Text(f"{row['id']}  {row['place']}", style="bold")]
    for side in ("chosen", "rejected"):
        line = Text()
        for name, ids in (("prompt", row["prompt_ids"]), (side, row[f"{side}_ids"])):
            _append(line, ids, tokenizer, _COLOURS[name])
        prompt, answer = len(row["prompt_ids"]), len(row[f"{side}_ids"])
        mask = Text(f"\nloss mask: 0 x {prompt} prompt tokens, 1 x {answer} answer tokens; ", style="dim")
        mask.append(_ending(row[f"{side}_ids"], tokenizer))
        parts.append(Panel(line + mask, title=side, border_style=_COLOURS[side], title_align="left"))
    console.print(Group(*parts))


def _append(line: Text, ids: list[int], tokenizer: Any, colour: str) -> None:
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for i in ids:
        # Control characters (escape codes above all) are shown, not obeyed.
        word = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in tokenizer.decode([i]))
        is_control = i in special
        line.append(word.replace("\n", "⏎\n"), style=f"{colour} reverse" if is_control else colour)
        line.append("|", style="bright_black")


def _ending(ids: list[int], tokenizer: Any) -> str:
    if not ids:
        return "no answer token"
    tail = [n for n, i in enumerate(ids[-4:]) if i == tokenizer.eos_token_id]
    return (
        f"ends with {tokenizer.eos_token}" if tail else "does not end with the end-of-turn token (cut, or not written)"
    )

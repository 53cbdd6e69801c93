"""Pairs as they are trained: every token, in colour, with the loss mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

_COLOURS = {"prompt": "dim", "chosen": "green", "rejected": "red"}


def show(row: dict[str, Any], tokenizer: Any, console: Console) -> None:
    """Print one tokenised pair.

    Tokens are parted by bars; under each stands its place in the loss mask: ``1`` is in the loss, ``0`` is only read.
    Control tokens are reversed, so that the end of a turn can be seen.
    """
    parts: list[Text | Panel] = [Text(f"{row['id']}  {row['place']}", style="bold")]
    for side in ("chosen", "rejected"):
        prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
        words = [*_words(prompt, tokenizer, _COLOURS["prompt"]), *_words(answer, tokenizer, _COLOURS[side])]
        mask = "0" * len(prompt) + "1" * len(answer)
        told = Text(f"loss mask: 0 for {len(prompt)} prompt tokens, 1 for {len(answer)} answer tokens; ", style="dim")
        told.append(_ending(answer, tokenizer))
        body = _laid_out(words, mask, max(20, console.width - 4))
        parts.append(Panel(Group(body, told), title=side, border_style=_COLOURS[side], title_align="left"))
    console.print(Group(*parts))


def _words(ids: list[int], tokenizer: Any, colour: str) -> Iterator[Text]:
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for i in ids:
        # Control characters (escape codes above all) are shown, not obeyed.
        word = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in tokenizer.decode([i]))
        yield Text(word.replace("\n", "⏎"), style=f"{colour} reverse" if i in special else colour)


def _laid_out(words: list[Text], mask: str, width: int) -> Text:
    """Lines of at most ``width`` cells, each with the mask of its tokens below; a token with ⏎ ends its line."""
    whole, line, below, used = Text(), Text(), "", 0
    for number, (word, bit) in enumerate(zip(words, mask, strict=True)):
        cells = word.cell_len + 1
        if used and used + cells > width:
            whole.append(line).append(f"\n{below}\n", style="bright_black")
            line, below, used = Text(), "", 0
        line.append(word).append("|", style="bright_black")
        below += bit.ljust(cells)
        used += cells
        if word.plain.endswith("⏎") or number == len(words) - 1:
            whole.append(line).append(f"\n{below}\n", style="bright_black")
            line, below, used = Text(), "", 0
    return whole


def _ending(ids: list[int], tokenizer: Any) -> str:
    if not ids:
        return "no answer token"
    tail = [n for n, i in enumerate(ids[-4:]) if i == tokenizer.eos_token_id]
    return (
        f"ends with {tokenizer.eos_token}" if tail else "does not end with the end-of-turn token (cut, or not written)"
    )

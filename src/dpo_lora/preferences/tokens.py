"""Pairs as they are trained: token ids after template and truncation."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import jinja2
import xxhash

from dpo_lora.preferences.lint.texts import content
from dpo_lora.preferences.shapes.pair import Message, Pair, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class _Text:
    """One text to tokenise."""

    text: str
    plain: bool = False  # no template: the tokenizer adds what it begins texts with
    hidden: dict[str, str] | None = None  # placeholder -> the spelled control token it stands for


@dataclass
class Encoded:
    """One pair's token ids; the answers are cut, ``full`` has their lengths before that."""

    prompt: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    full: tuple[int, int] = (0, 0)
    faults: list[str] = field(default_factory=list)


class Encoder:
    """Template, tokenisation and truncation of pairs, and the faults that only show there.

    Control tokens come from the template alone: where a message spells one (``<|im_start|>``), its
    characters are tokenised as the plain text they are. Texts that spell none go through the
    tokenizer whole, exactly as transformers would take them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, stop_ids: Collection[int] = ()):
        """
        Args:
            max_length: tokens of prompt + answer that are kept, from the start.
            stop_ids: token ids at which generation stops, besides the tokenizer's own eos.
        """
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.stops = {tokenizer.eos_token_id, *stop_ids} - {None}
        self._special = {t.content: (i, t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        # The longest first, so that one which begins like another is taken whole.
        spellings = sorted(self._special, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self._special_ids = {i for i, _ in self._special.values()}
        self.ends = frozenset(text for text, (i, _) in self._special.items() if i in self.stops)

    def identity(self) -> str:
        """32 hex digits of everything here that token ids depend on (XXH3, 128 bit)."""
        import tokenizers
        import transformers

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        parts = [
            backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items())),
            json.dumps(self.tokenizer.chat_template),
            repr(sorted((k, str(v)) for k, v in self.tokenizer.special_tokens_map.items())),
            repr((type(self.tokenizer).__name__, self.max_length, sorted(self.stops))),
            repr((tokenizers.__version__, transformers.__version__)),
        ]
        return xxhash.xxh3_128_hexdigest("\0".join(parts).encode("utf-8", "surrogatepass"))

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """The ids of each pair, in order; a pair that the template refuses has none and says so."""
        written = [self._written(pair) for pair in pairs]
        ids = iter(self._tokenised([text for texts in written for text in texts]))
        return [
            self._encoded(pair, texts, [next(ids) for _ in texts]) if texts else Encoded(faults=["template_refuses"])
            for pair, texts in zip(pairs, written, strict=True)
        ]

    # -- from pairs to texts

    def _written(self, pair: Pair) -> list[_Text]:
        """Prompt, prompt + chosen, prompt + rejected; empty where the template refuses."""
        if isinstance(pair.prompt, str):
            assert isinstance(pair.chosen, str)
            assert isinstance(pair.rejected, str)
            sides = [self._unclosed(side) for side in (pair.chosen, pair.rejected)]
            texts = [pair.prompt, *(pair.prompt + side for side in sides)]
            spelled = any(self._spelled.search(t) for t in texts)
            return [_Text(t, plain=True, hidden={} if spelled else None) for t in texts]
        hidden: dict[str, str] | None = None
        turns: list[Turns] = [pair.prompt, pair.chosen, pair.rejected]
        if any(self._spelled.search(content(t)) for t in turns):
            hidden = {}
            turns = [self._hide(t, hidden) for t in turns]
        prompt, chosen, rejected = turns
        try:
            return [
                _Text(self._render(prompt, [], pair.tools), hidden=hidden),
                _Text(self._render(prompt, chosen, pair.tools), hidden=hidden),
                _Text(self._render(prompt, rejected, pair.tools), hidden=hidden),
            ]
        except (jinja2.TemplateError, TypeError, ValueError, KeyError):
            return []  # each template has its own way to refuse; which rows it refuses is what lint tells

    def _render(self, prompt: Turns, answer: Turns, tools: list[dict[str, Any]] | None) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [*prompt, *answer], tools=cast("Any", tools), tokenize=False, add_generation_prompt=not answer
            )
        )

    def _unclosed(self, answer: str) -> str:
        """A plain answer without the end token it may close itself with; it comes back as a token."""
        return answer.removesuffix(self.tokenizer.eos_token or "")

    def _hide(self, turns: Turns, hidden: dict[str, str]) -> list[Message]:
        def replace(found: re.Match[str]) -> str:
            # Private-use characters: no template acts on them, and a text that has them too is told apart below.
            name = f"\ue000{len(hidden)}\ue001"
            hidden[name] = found.group()
            return name

        assert not isinstance(turns, str)
        return [{**m, "content": self._spelled.sub(replace, m["content"].replace("\ue000", "\ufffd"))} for m in turns]

    # -- from texts to ids

    def _tokenised(self, texts: list[_Text]) -> list[list[int]]:
        ids: list[list[int]] = [[] for _ in texts]
        for plain in (False, True):
            places = [n for n, t in enumerate(texts) if t.hidden is None and t.plain is plain]
            for n, row in zip(places, self._ids([texts[n].text for n in places], add=plain), strict=True):
                ids[n] = row
        for n, text in enumerate(texts):
            if text.hidden is not None:
                ids[n] = self._ids([text.text], add=True, split=True)[0] if text.plain else self._guarded(text)
        return ids

    def _ids(self, texts: list[str], *, add: bool = False, split: bool = False) -> list[list[int]]:
        if not texts:
            return []
        # What is left of lone surrogates outside of messages (tool names, roles) no tokenizer can take.
        clean = [t if t.isascii() else t.encode("utf-8", "replace").decode() for t in texts]
        encoding = self.tokenizer(
            clean, add_special_tokens=add, split_special_tokens=split, return_attention_mask=False, verbose=False
        )
        return list(encoding["input_ids"])

    def _guarded(self, text: _Text) -> list[int]:
        """The template's own control tokens as tokens, everything between them as plain text.

        A tokenizer splits at control tokens before anything else, so its ids of the parts, joined,
        are its ids of the whole.
        """
        assert text.hidden is not None
        ids: list[int] = []
        end, strip_next = 0, False
        for found in self._spelled.finditer(text.text):
            token_id, token = self._special[found.group()]
            ids += self._fragment(text.text[end : found.start()], text.hidden, strip_next, token.lstrip)
            ids.append(token_id)
            end, strip_next = found.end(), token.rstrip
        return ids + self._fragment(text.text[end:], text.hidden, strip_next, False)

    def _fragment(self, text: str, hidden: dict[str, str], left: bool, right: bool) -> list[int]:
        text = re.sub("\ue000[0-9]+\ue001", lambda found: hidden.get(found.group(), found.group()), text)
        text = text.lstrip() if left else text
        text = text.rstrip() if right else text
        return self._ids([text], split=True)[0] if text else []

    # -- from ids to a pair

    def _encoded(self, pair: Pair, texts: list[_Text], ids: list[list[int]]) -> Encoded:
        prompt, *sides = ids
        plain, eos = texts[0].plain, self.tokenizer.eos_token_id
        if plain:
            prompt = prompt[:-1] if prompt and prompt[-1] == eos else prompt
            sides = [side if side and side[-1] == eos else [*side, eos] for side in sides]
        # The answer starts where the renderings with and without it part: for some templates and
        # merges that is before the prompt's last token.
        start = min(_common_prefix(prompt, side) for side in sides)
        chosen, rejected = (side[start : self.max_length] for side in sides)
        full = (len(sides[0]) - start, len(sides[1]) - start)
        encoded = Encoded(prompt[:start], chosen, rejected, full)
        encoded.faults = list(self._faults(pair, texts, encoded, [side[start:] for side in sides]))
        return encoded

    def _faults(self, pair: Pair, texts: list[_Text], encoded: Encoded, answers: list[list[int]]) -> list[str]:
        found = []
        if len(encoded.prompt) >= self.max_length:
            found.append("prompt_fills_length")
        elif encoded.chosen == encoded.rejected and pair.chosen != pair.rejected:
            found.append("identical_after_truncation")
        elif encoded.full != (len(encoded.chosen), len(encoded.rejected)):
            found.append("truncated")
        if texts[0].hidden is not None:
            found.append("special_token_in_text")
        if texts[0].plain:
            found.append("no_template")
            return found
        if not all(t.text.startswith(texts[0].text) for t in texts[1:]):
            found.append("prompt_renders_differently")
        return found + sorted({fault for ids in answers if (fault := self._ending(ids))})

    def _ending(self, ids: list[int]) -> str | None:
        """What is wrong with how an uncut answer ends. A template may write a line break after the end token."""
        tail = ids[-4:]
        stops = [n for n, i in enumerate(tail) if i in self.stops]
        if not stops:
            return "end_of_turn_wrong" if any(i in self._special_ids for i in tail) else "end_of_turn_missing"
        return "end_of_turn_doubled" if len(stops) > 1 and stops[-1] == stops[-2] + 1 else None


def _common_prefix(a: list[int], b: list[int]) -> int:
    if a == b[: len(a)]:
        return len(a)
    return next(n for n, (x, y) in enumerate(zip(a, b + [-1] * len(a), strict=False)) if x != y)

"""The catalogue of findings: name, level, what it means, what to do. docs/data.md shows it; a test keeps them alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Kind:
    """One kind of finding. Rows with an error are never trained; of the others, those that data.drop names."""

    name: str
    level: str
    title: str
    advice: str


# In order: a row's findings are the bits of one integer, by place in this list. New ones go to the end.
ROW_KINDS = (
    Kind("empty_side", ERROR, "an answer is empty or blank", "Fill it in, or see whether a column is named wrongly."),
    Kind(
        "empty_prompt",
        ERROR,
        "the prompt is empty or blank",
        "Is the prompt's column named? data.columns={prompt: NAME}",
    ),
    Kind("identical_sides", ERROR, "chosen and rejected are the same", "There is nothing to learn from it: remove it."),
    Kind(
        "identical_after_truncation",
        ERROR,
        "the same after the cut: chosen and rejected differ only past data.max_length",
        "Raise data.max_length, or cut the shared beginning.",
    ),
    Kind(
        "prompt_fills_length",
        ERROR,
        "the prompt alone fills data.max_length, so no answer token is left",
        "Raise data.max_length.",
    ),
    Kind(
        "wrong_roles",
        ERROR,
        "an unknown role, a prompt that does not end with the user, or an answer not by the assistant",
        "Messages are system, then user and assistant in turn (tool after assistant); the answer is the assistant's.",
    ),
    Kind(
        "template_refuses",
        ERROR,
        "the model's chat template does not take this conversation",
        "Some templates know no system turn or no tools: fold them into the user's turn.",
    ),
    Kind("truncated", NOTE, "an answer is cut at data.max_length", "Raise data.max_length if many are."),
    Kind(
        "end_of_turn_missing",
        WARNING,
        "the trained answer does not end with an end-of-turn token, so stopping is not learned",
        "Use a chat template that closes the assistant's turn.",
    ),
    Kind(
        "end_of_turn_doubled",
        WARNING,
        "an end-of-turn marker is in the text already, or comes twice",
        "Strip it from the answer: the template adds it.",
    ),
    Kind(
        "end_of_turn_wrong",
        WARNING,
        "the answer ends with a marker that does not end this model's turn",
        "Strip other models' markers from the text; check that the tokenizer's eos_token is what its template writes.",
    ),
    Kind(
        "prompt_renders_differently",
        WARNING,
        "the template writes the prompt alone otherwise than before an answer",
        "The model is asked with another text than it is trained on; see the template's generation prompt.",
    ),
    Kind(
        "special_token_in_text",
        WARNING,
        "a text spells a control token of this model (trained as plain text, it cannot forge a turn)",
        "Clean it if it is left over from another template; keep it if it is spoken about.",
    ),
    Kind(
        "no_template",
        NOTE,
        "plain text: trained without the model's chat template",
        "For an instruct model say data.plain_text=chat, so that it is trained as it will be asked.",
    ),
    Kind(
        "role_order",
        WARNING,
        "two turns of one role in a row, or a system turn after the start",
        "Join the turns or put the missing one in between.",
    ),
    Kind(
        "score_contradicts",
        WARNING,
        "the source scores the rejected answer higher than the chosen one",
        "Are the columns swapped? Drop these rows: data.drop=[score_contradicts]",
    ),
    Kind("exact_duplicate", WARNING, "an earlier row is the same", "data.drop=[exact_duplicate]"),
    Kind(
        "near_duplicate",
        NOTE,
        "an earlier row is nearly the same (Jaccard similarity of word triples from data.near_duplicate on)",
        "data.drop=[near_duplicate]",
    ),
    Kind(
        "contradiction",
        WARNING,
        "another row prefers the same two answers to the same prompt the other way round",
        "They cancel out: data.drop=[contradiction]",
    ),
    Kind(
        "prompt_leak",
        WARNING,
        "a training row asks a held-out prompt; it is left out of training",
        "Part the files by prompt, or let the tool do it: data.heldout_path=null data.heldout_split=null",
    ),
    Kind(
        "near_prompt_leak",
        NOTE,
        "the prompt is nearly one of the other part's; it is left out",
        "Raise data.near_duplicate if these are different questions; null turns the search off.",
    ),
    Kind(
        "answer_in_prompt",
        WARNING,
        "the chosen answer stands word for word in the prompt, the rejected one does not",
        "The model learns to copy, or to say the same again: remove the answer from the prompt, or drop the row.",
    ),
    Kind(
        "mojibake",
        WARNING,
        "text decoded by the wrong table (such as â€™), or characters already lost (U+FFFD)",
        "Read the source again as UTF-8; ftfy repairs most of it.",
    ),
    Kind("control_character", WARNING, "NUL or another control character in a text", "Remove it."),
    Kind(
        "lone_surrogate",
        ERROR,
        "half a character (a lone UTF-16 surrogate), which no encoding can write",
        "Read the source again; something cut a text in the middle of an emoji.",
    ),
    Kind(
        "language_differs",
        NOTE,
        "the two answers are in different scripts",
        "The pair teaches a language, not an answer; fine if that is meant.",
    ),
    Kind(
        "length_outlier",
        NOTE,
        "three times longer or shorter than most, and a robust z-score of the log length beyond data.lint.outlier",
        "Look at them: often two rows run together, or a broken one.",
    ),
    Kind(
        "turn_in_text",
        NOTE,
        "a transcript's turn mark (Human:, Assistant:, ### Response:) stands inside a message",
        "Turns that were not taken apart teach the model to speak for the user.",
    ),
    Kind(
        "sides_alike",
        NOTE,
        "chosen and rejected differ in case, spacing or closing punctuation alone",
        "Little can be learned from it but that mark: data.drop=[sides_alike]",
    ),
)

SET_KINDS = (
    Kind(
        "length_bias",
        WARNING,
        "one side is mostly longer: picking by length alone would score high",
        "Expect longer (shorter) answers after training; balance the pairs, or see dpo.ld_alpha and dpo=sigmoid-norm.",
    ),
    Kind(
        "swapped_columns",
        WARNING,
        "chosen answers are marred (loops, scraps, prompt repeated) far more often than rejected ones",
        "Are the columns swapped? data.columns={chosen: rejected, rejected: chosen}",
    ),
    Kind(
        "repeated_id",
        NOTE,
        "ids come more than once; rows are told apart by file and number instead",
        "Give each pair its own id if you want to find it again.",
    ),
)

KINDS = {kind.name: kind for kind in (*ROW_KINDS, *SET_KINDS)}
BIT = {kind.name: 1 << place for place, kind in enumerate(ROW_KINDS)}
ERRORS = sum(BIT[kind.name] for kind in ROW_KINDS if kind.level == ERROR)


def bits(names: Iterable[str]) -> int:
    """The findings of a row as one integer."""
    total = 0
    for name in names:
        total |= BIT[name]
    return total

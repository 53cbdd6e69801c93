"""The shapes that are known, how each is told from a row, and what it becomes.

The list is in order: the first shape that matches a source's first row is taken for all its rows.
docs/data.md shows it; a test keeps the two alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dpo_lora.choices import Pairing
from dpo_lora.errors import UserError, nearest
from dpo_lora.preferences.shapes import convert, rankings, transcripts
from dpo_lora.preferences.shapes.convert import Row
from dpo_lora.preferences.shapes.pair import Pair, ShapeError


@dataclass(frozen=True)
class Shape:
    """One shape of rows."""

    name: str
    looks: str  # the columns it is told by
    becomes: str  # what is done with it; the log says so
    matches: Callable[[Row], bool]
    convert: Callable[[Row, Pairing], Iterator[Pair]]
    is_text: bool = False  # its pairs have no turns, unless data.plain_text makes some


# Names that other projects give to our columns; taken where ours is absent.
ALIASES = {
    "chosen": ("chosen_response", "response_chosen", "chosen_answer", "answer_chosen", "preferred_response"),
    "rejected": (
        "rejected_response",
        "response_rejected",
        "rejected_answer",
        "answer_rejected",
        "dispreferred_response",
    ),
}


def renamed(row: Row, columns: dict[str, str]) -> Row:
    """The row with our column names, by the settings first and by known aliases then.

    Raises:
        ShapeError: a column that the settings name is not there.
    """
    taken = set(columns.values())
    for theirs in taken:
        if theirs not in row:
            raise ShapeError(f"it has no column {theirs!r}, which data.columns names.{nearest(theirs, row)}")
    ours = {k: v for k, v in row.items() if k not in taken and k not in columns}
    ours |= {name: row[theirs] for name, theirs in columns.items()}
    for name, others in ALIASES.items():
        found = next((o for o in others if o in ours), None)
        if name not in ours and found is not None:
            ours[name] = ours.pop(found)
    return ours


EXPLICIT_TEXT = Shape(
    "text, explicit prompt",
    "prompt, chosen, rejected: texts (TRL)",
    "a user's and an assistant's turn where the model has a chat template, else as it is (data.plain_text)",
    lambda row: convert.is_plain(row) and isinstance(row.get("prompt"), str),
    convert.plain_texts,
    is_text=True,
)
SHAPES = (
    Shape(
        "OASST tree",
        "prompt: {text, role, replies: [{rank, ...}]}",
        "the ranked replies to each user turn, paired by data.pairing; the path to the turn is the prompt",
        lambda row: isinstance(row.get("prompt"), dict) and "replies" in row["prompt"],
        convert.reply_tree,
    ),
    Shape(
        "ranked list",
        "prompt or instruction; completions, responses, answers, each with a score or rank (UltraFeedback, Nectar)",
        "two answers of different score, paired by data.pairing",
        rankings.is_list,
        convert.ranked_list,
    ),
    Shape(
        "comparison",
        "prompt or history; response_0/_1 (a/b, 1/2, human_ref_A/B, conversation_a/b) and a winner (SHP, Arena)",
        "the winner is chosen, the other rejected; ties give no pair",
        rankings.is_compared,
        convert.comparison,
    ),
    Shape(
        "ShareGPT ranking",
        "conversations: [{from, value}], chosen, rejected",
        "conversations is the prompt; human, gpt, observation become user, assistant, tool",
        lambda row: convert.has_sides(row) and isinstance(row.get("conversations"), list),
        convert.sharegpt,
    ),
    Shape(
        "Alpaca ranking",
        "instruction (and input, history, system); chosen and rejected, or output: [better, worse]",
        "instruction and input are the user's turn, on lines of their own",
        convert.is_alpaca,
        convert.alpaca,
    ),
    Shape(
        "Orca",
        "question (and system), chosen, rejected",
        "question is the user's turn, after the system turn where it is not empty",
        lambda row: convert.is_plain(row) and isinstance(row.get("question"), str) and "prompt" not in row,
        convert.orca,
    ),
    Shape(
        "transcript",
        'chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic HH) or rendered ChatML',
        "cut into turns; the turns that both share are the prompt",
        lambda row: (
            convert.is_plain(row)
            and any(
                told(row["chosen"]) and told(row["rejected"]) for told in (transcripts.is_hh, transcripts.is_chatml)
            )
        ),
        convert.cut_transcripts,
    ),
    Shape(
        "rendered prompt",
        'prompt: "\\n\\nHuman: ...\\n\\nAssistant:" or "<|im_start|>user\\n..."; chosen, rejected: texts',
        "the prompt's turns are taken apart again, to be put through the model's own template",
        lambda row: (
            convert.is_plain(row)
            and any(told(row.get("prompt")) for told in (transcripts.is_hh, transcripts.is_chatml))
        ),
        convert.rendered_prompt,
    ),
    Shape(
        "conversation, explicit prompt",
        "prompt (a text or messages), chosen, rejected: messages (TRL, UltraFeedback binarised)",
        "as it is; where both sides repeat the prompt, it is taken off",
        lambda row: convert.is_conversational(row) and row.get("prompt") is not None,
        convert.conversations,
    ),
    Shape(
        "conversation, implicit prompt",
        "chosen, rejected: whole conversations (TRL)",
        "the messages that both begin with are the prompt",
        convert.is_conversational,
        convert.conversations,
    ),
    EXPLICIT_TEXT,
    Shape(
        "text, implicit prompt",
        "chosen, rejected: texts (TRL)",
        "the text that both begin with is the prompt",
        lambda row: convert.is_plain(row) and row.get("prompt") is None,
        convert.joined_texts,
        is_text=True,
    ),
)


def recognise(row: Row, source: str) -> Shape:
    """The shape of a source, by one of its rows (renamed).

    Raises:
        UserError: it is none of the known ones; says which columns there are and what to do.
    """
    for shape in SHAPES:
        if shape.matches(row):
            return shape
    have = ", ".join(row)
    if "label" in row and "completion" in row:
        raise UserError(
            f"{source} has unpaired answers (completion, label), as for KTO; DPO needs two answers to a prompt. "
            "Pair them first: prompt, chosen, rejected."
        )
    missing = [side for side in ("chosen", "rejected") if side not in row]
    if missing:
        raise UserError(
            f"{source} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has {have}. If they have "
            f"another name, say so: 'data.columns={{{missing[0]}: NAME}}'. docs/data.md lists the known shapes."
        )
    raise UserError(
        f"{source}: chosen and rejected are neither texts nor messages ([{{role, content}}, ...]); it has {have}."
    )


def unused(shape: Shape, row: Row, in_turns: bool) -> list[str]:
    """Columns that a conversion of ``shape`` does not read, for the log: a misnamed prompt shows there.

    in_turns: texts become turns (data.plain_text).
    """
    read = {"id", "topic", "split", "chosen", "rejected", "prompt", "conversations"}
    if in_turns or not shape.is_text:
        read |= {"system", "tools"}
    read |= {name for both in convert.SCORES for name in both}
    if shape.name in ("ranked list", "comparison", "Alpaca ranking", "Orca"):
        read |= {*convert.PROMPTS, *rankings.LISTS, "output", "scores", "ranks", "ratings", *rankings.WINNERS}
        read |= {name for both in rankings.COMPARED for name in both}
    return [name for name in row if name not in read]

"""``dpo-lora lint``: look at the pairs a run would train on, and train nothing."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from dpo_lora import model
from dpo_lora.files import write_json
from dpo_lora.lifecycle import quiet_libraries
from dpo_lora.preferences import pairs
from dpo_lora.preferences.lint import report, show
from dpo_lora.schema import RunSettings


def lint(settings: RunSettings, console: Console, json_file: Path | None, shown: int) -> bool:
    """Print the report, and ``shown`` pairs as they are trained; whether training would start.

    Args:
        json_file: where the report goes as JSON as well.

    Raises:
        UserError: the pairs cannot be read at all.
    """
    quiet_libraries()
    tokenizer, stop_ids = model.load_tokenizer(settings.model)
    looked = pairs.look(settings.data, tokenizer, settings.seed, stop_ids=stop_ids)
    refusals = [*looked.report["refusals"], *report.nothing_left(looked.report, settings.data)]
    found = {**looked.report, "refusals": refusals}
    for style, line in report.lines(found):
        console.print(Text(line, style=style), soft_wrap=True)
    for number in range(min(shown, len(looked.train))):
        show.show(looked.rows[int(looked.train[number])], tokenizer, console)
    if json_file is not None:
        write_json(json_file, found)
    return not refusals

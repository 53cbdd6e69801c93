"""report.html and index.html: complete, self-contained, and data stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_lora.checkpoints import at_step
from dpo_lora.files import append_jsonl, read_jsonl, write_json
from dpo_lora.reports import index, report
from dpo_lora.reports.difference import differing
from dpo_lora.reports.pages import safe_link
from dpo_lora.rundir import RunDir
from harness import CommandLine, make_pair

HOSTILE = "</style></script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def hostile(run: Path) -> RunDir:
    """The run, with every text that comes from outside turned against its reader."""
    directory = RunDir(run)
    rows = [json.loads(line) for line in directory.samples_file.read_text().splitlines()]
    directory.samples_file.unlink()
    append_jsonl(
        directory.samples_file,
        [
            {
                **row,
                "id": HOSTILE,
                "prompt": HOSTILE,
                "preferred": HOSTILE,
                "policy": {**row["policy"], "text": f"{HOSTILE} \x00 {HOSTILE}"},
            }
            for row in rows
        ],
    )
    evaluation = json.loads(directory.eval_file.read_text())
    for group in evaluation["after"]["by_topic"]:
        group["name"] = f"{HOSTILE} $\\frac{{$"
    write_json(directory.eval_file, evaluation)
    directory.write_manifest(
        {
            "reason": HOSTILE,
            "command": ["dpo-lora", HOSTILE],
            "tracker": {"url": "javascript:document.title='owned'"},
            "parent": {"name": HOSTILE, "link": "javascript:alert(1)"},
            "data": {**directory.manifest()["data"], "path": HOSTILE},
        }
    )
    return directory


def test_every_run_leaves_a_report(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    assert len(text.encode()) < 1_500_000
    after = json.loads((finished / "eval.json").read_text())["after"]
    for fact in (
        f"{after['accuracy']:.3f}",
        "Accuracy by topic",
        "Learning rate",
        "KL to the reference",
        "Answers before and after",
        "dpo-lora train",
        "prefers-color-scheme: dark",
        "What is",
    ):
        assert fact in text
    assert text.count('role="img" aria-label="') >= 12
    assert not re.search(r'(src|href)="(https?:)?//', text)


def test_settings_that_differ_from_the_default_are_marked(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    changed = set(re.findall(r'<tr class="changed"><td><code>([^<]+)', text))
    assert {"train.learning_rate", "eval.every", "train.max_steps"} <= changed
    assert "dpo.beta" not in changed
    folded = text[text.index('<details class="print">') :].split("</details>")[0]
    assert "<code>dpo.beta</code>" in folded
    assert "<code>train.learning_rate</code>" not in folded


def test_the_data_section_says_what_lint_found(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    rows = [make_pair(n) for n in range(40)]
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5] = {**rows[4], "id": "again"}
    file = tmp_path / "faulty.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"data.path={file}", "data.drop=[exact_duplicate]", "eval.samples=0")
    run = cli("train", *tiny_overrides, *words, "eval.report=true").run
    lint = json.loads((run / "lint.json").read_text())
    text = (run / "report.html").read_text()
    text = re.sub(r"<[^>]+>", "", text[text.index("<h2>Data") : text.index("<h2>Settings")])
    wins = lint["lengths"]["longer_wins"]
    for fact in (
        f"40 pairs on 38 prompts: {lint['used']['train']} to train on, {lint['used']['heldout']} held out, 2 left out",
        "identical_sides 1, exact_duplicate 1",
        f"{wins['accuracy']:.3f} of the training pairs (95 % interval {wins['interval'][0]:.3f}",
        "Lint: 1 errors, 1 warnings, 0 notes",
        "error chosen and rejected are the same",
        "There is nothing to learn from it: remove it.",
        f"{file}, line 4 (id pair-3)",
    ):
        assert fact in text, fact


def test_a_run_that_fails_in_training_says_where_why_and_how_to_go_on(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "burst run")
    words = ("train.learning_rate=1e30", "train.max_grad_norm=1e30", "train.warmup=0", "train.save_every=1")
    assert cli("train", *tiny_overrides, *words, "eval.report=true", f"run_dir={run}").code == 2
    last = max(row["step"] for row in read_jsonl(run.metrics_file))
    text = run.report_file.read_text()
    top = text[: text.index("<h2>What the numbers say")]
    for fact in (
        f"Failed after step {last} of 4",
        f"The checkpoint of step {last} is whole",
        f"dpo-lora resume &#39;{run}&#39;",
        "If they are the cause, change them",
        "train.learning_rate=1e30",
        "ERROR dpo_lora.lifecycle",
    ):
        assert fact in top, fact
    assert "NotFiniteError" not in top, "people are told what happened, not the name of a class"
    assert "Held-out accuracy" not in text, "a score from before the first update is none of this run's"

    # Killed, a process leaves no word, and perhaps half a checkpoint.
    facts = run.manifest()
    write_json(
        run.manifest_file, {k: v for k, v in facts.items() if k not in ("reason", "ended")} | {"status": "running"}
    )
    newest = at_step(run.checkpoints, last)
    (newest / "adapter_model.safetensors").write_bytes(b"")
    top = report.page(run).split("What the numbers say")[0]
    assert f"Interrupted after step {last} of 4" in top
    assert "left no reason: it was killed" in top
    assert f"The checkpoint of step {last} is whole" not in top
    assert newest.is_dir(), "a report sets nothing aside"


def test_a_failed_run_has_a_report_with_its_reason(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    done = cli("train", *tiny_overrides, "eval.report=true", "lora.targets=[nonsense]")
    assert done.code == 2
    [page] = (tmp_path / "outputs").glob("*/report.html")
    text = page.read_text()
    assert "nonsense" in text
    assert "Failed before the first step" in text
    assert "then start again" in text


def test_hostile_text_stays_text(own_run: Path) -> None:
    text = report.page(hostile(own_run))
    assert "<script>document" not in text
    assert "<img" not in text
    assert "javascript:" not in re.sub(r"(?s)<pre>.*?</pre>", "", text)
    assert "\x00" not in text
    assert "&lt;script&gt;" in text


def test_links_lead_to_the_web_or_beside_the_page() -> None:
    assert safe_link("https://wandb.ai/x") == "https://wandb.ai/x"
    assert safe_link("../dpo-x-lora-output-1/README.md") == "../dpo-x-lora-output-1/README.md"
    for bad in ("javascript:alert(1)", "JavaScript:alert(1)", " javascript:alert(1)", "data:text/html,x", "//evil", ""):
        assert safe_link(bad) is None


def test_differences_are_found_and_nothing_is_lost() -> None:
    before, after = "the sky is blue  today", "the sea is blue  today."
    left, right = differing(before, after)
    assert "".join(t for _, t in left) == before
    assert "".join(t for _, t in right) == after
    assert [t for marked, t in right if marked] == ["sea", "today."]


def many_runs(outputs: Path, source: Path, count: int) -> None:
    manifest, settings = (source / "run.json").read_text(), (source / "settings.yaml").read_text()
    evaluation = json.loads((source / "eval.json").read_text())
    for number in range(count):
        run = outputs / f"dpo-many-lora-output-{number:04d}"
        run.mkdir(parents=True)
        (run / "settings.yaml").write_text(settings)
        (run / "run.json").write_text(manifest.replace('"finished"', '"failed"') if number % 10 == 0 else manifest)
        evaluation["after"]["accuracy"] = (number * 7919 % 1000) / 1000
        if number % 10:
            write_json(run / "eval.json", evaluation)


def test_the_index_lists_a_thousand_runs(cli: CommandLine, finished: Path, tmp_path: Path) -> None:
    many_runs(tmp_path / "many", finished, 1000)
    done = cli("report", str(tmp_path / "many"))
    text = Path(done.out.strip().splitlines()[-1]).read_text()
    assert text.count('<tr data-status="') == 1000
    assert text.count('<tr data-status="failed"') == 100
    assert len(text.encode()) < 1_500_000


def test_pages_open_in_a_browser(finished: Path, browser: Any, write_probe: Callable[[Path, str], Path]) -> None:
    page = finished / "report.html"
    assert browser.console(page) == ""
    # With the page's own policy lifted: it asks for nothing even where it might.
    asked = write_probe(
        page,
        """
        addEventListener("load", () => {
          const names = performance.getEntriesByType("resource").map((entry) => entry.name);
          document.body.dataset.result = JSON.stringify(names);
        });
        """,
    )
    assert 'data-result="[]"' in browser.document(asked)
    assert browser.document(page).count("<svg") >= 12


def test_hostile_text_does_nothing_in_a_browser(own_run: Path, browser: Any) -> None:
    directory = hostile(own_run)
    report.write(directory)
    document = browser.document(directory.report_file)
    assert "<title>owned" not in document
    assert "document.title='owned'" in document  # it is there, as text


def test_the_index_sorts_and_filters(
    finished: Path, tmp_path: Path, browser: Any, write_probe: Callable[[Path, str], Path]
) -> None:
    many_runs(tmp_path / "many", finished, 60)
    page = index.write(tmp_path / "many")
    assert browser.console(page) == ""
    probe = write_probe(
        page,
        """
        const heads = [...document.querySelectorAll("th button")];
        const column = heads.findIndex((h) => h.textContent === "accuracy");
        const shown = () => [...document.querySelectorAll("tbody tr:not([hidden])")];
        const values = () => shown().map((r) => r.cells[column].dataset.value);
        heads[column].click(); const up = values();
        heads[column].click(); const down = values();
        const words = document.querySelector(".filter input");
        words.value = "0007"; words.dispatchEvent(new Event("input"));
        const one = values().length; words.value = ""; words.dispatchEvent(new Event("input"));
        const status = document.querySelector(".filter select[name=status]");
        status.value = "failed"; status.dispatchEvent(new Event("change"));
        document.body.dataset.result = JSON.stringify({ up, down, one, failed: values().length });
        """,
    )
    found = re.search(r'data-result="([^"]*)"', browser.document(probe))
    assert found
    result = json.loads(found[1].replace("&quot;", '"'))
    up = [float(v) for v in result["up"] if v]
    assert up == sorted(up)
    assert len(up) == 54
    assert [float(v) for v in result["down"] if v] == up[::-1]
    assert result["up"][54:] == [""] * 6, "runs without a figure come last"
    assert result["one"] == 1
    assert result["failed"] == 6


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(59.4, "59 s"), (59.7, "1 min 0 s"), (419.7, "7 min 0 s"), (3599.6, "1 h 0 min"), (5400, "1 h 30 min")],
)
def test_no_minute_has_sixty_seconds(seconds: float, said: str) -> None:
    assert report.duration(seconds) == said

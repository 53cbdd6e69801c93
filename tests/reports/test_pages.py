"""report.html and index.html: complete, self-contained, and data stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_lora.files import append_jsonl, write_json
from dpo_lora.reports import index, report
from dpo_lora.reports.difference import differing
from dpo_lora.reports.pages import safe_link
from dpo_lora.rundir import RunDir
from harness import CommandLine

HOSTILE = "</style></script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture
def finished(cli: CommandLine, tiny_overrides: list[str]) -> Path:
    return cli("train", *tiny_overrides, "eval.every=2", "train.learning_rate=1e-2").run


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


def test_a_failed_run_has_a_report_with_its_reason(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    done = cli("train", *tiny_overrides, "lora.targets=[nonsense]")
    assert done.code == 2
    [page] = (tmp_path / "outputs").glob("*/report.html")
    text = page.read_text()
    assert "nonsense" in text
    assert "Why it failed" in text


def test_hostile_text_stays_text(finished: Path) -> None:
    text = report.page(hostile(finished))
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


def test_hostile_text_does_nothing_in_a_browser(finished: Path, browser: Any) -> None:
    directory = hostile(finished)
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
        const status = document.querySelector(".filter select");
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

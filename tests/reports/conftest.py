"""One finished run that every test of this folder may read, and a headless Chromium, where there is one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from one_run import one_run

QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=4000",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip


class Browser:
    """Opens pages from the disk and says what became of them."""

    def __init__(self, program: str, scratch: Path):
        self.program, self.scratch = program, scratch
        self.count = 0

    def _run(self, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        self.count += 1
        profile = self.scratch / f"profile-{self.count}"
        return subprocess.run(
            [self.program, *QUIET, f"--user-data-dir={profile}", *flags, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    def document(self, page: Path) -> str:
        """The document after its scripts ran."""
        return self._run(page, "--dump-dom").stdout

    def console(self, page: Path) -> str:
        """What the page wrote to the console, errors and refusals included."""
        lines = self._run(page, "--dump-dom", "--enable-logging=stderr", "--v=0").stderr.splitlines()
        return "\n".join(line for line in lines if "CONSOLE" in line)


@pytest.fixture(scope="session")
def finished(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a base model whose licence has a name of its own; nothing may be written into its directory."""
    folder = tmp_path_factory.mktemp("reports")
    base = Path(shutil.copytree(tiny_model, folder / "base"))
    licence = "license: other\nlicense_name: tiny-research\nlicense_link: https://example.org/licence"
    (base / "README.md").write_text(f"---\n{licence}\n---\nA model.\n")
    return one_run(base, pairs_file, folder, "eval.every=2", "train.learning_rate=1e-2", "eval.report=true")


@pytest.fixture
def own_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on PATH (apt install chromium): pages are not opened in a browser")
    return Browser(program, tmp_path)


@pytest.fixture
def write_probe(tmp_path: Path) -> Callable[[Path, str], Path]:
    """A copy of a page with a script of the test's added; the page's own policy is lifted for it."""

    def write(page: Path, script: str) -> Path:
        text = page.read_text(encoding="utf-8")
        start = text.index("<meta http-equiv")
        text = text[:start] + text[text.index(">", start) + 1 :]
        copy = tmp_path / "probe.html"
        copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
        return copy

    return write

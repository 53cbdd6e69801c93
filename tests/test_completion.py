"""Tab completion through the installed console script, as bash asks for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
eval "$({program} train -sc install=bash)"
COMP_LINE="$1"; COMP_POINT=${{#1}}; read -ra COMP_WORDS <<<"$1"; COMP_CWORD=$((${{#COMP_WORDS[@]}}-1))
hydra_bash_completion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("dpo-lora tr", ["train"]),
        ("dpo-lora train lora=a", ["lora=all-linear", "lora=attention"]),
        ("dpo-lora train seed=1 dpo.be", ["dpo.beta="]),
    ],
)
def test_bash_completes_commands_presets_and_settings(typed: str, expected: list[str]) -> None:
    bash, folder = shutil.which("bash"), Path(sys.executable).parent
    if bash is None or not (folder / "dpo-lora").exists():
        pytest.skip("needs bash and the installed console script")
    done = subprocess.run(
        [bash, "-c", SCRIPT.format(program="dpo-lora"), "bash", typed],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
    )
    assert sorted(done.stdout.split()) == expected, done.stderr

"""The library is compiled once, by whichever compiler there is, and nothing needs it."""

from __future__ import annotations

import logging
import shlex
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.engine import worlds
from tests.engine.native.test_passes import WIDE

from dpo_lora.engine import cpu_passes, proofs
from dpo_lora.engine.decoder import read_layers
from dpo_lora.engine.native import library, passes


@pytest.fixture(autouse=True)
def anew():
    """No test sees what another has loaded."""
    library._loaded.cache_clear()
    yield
    library._loaded.cache_clear()


@pytest.fixture
def compiler():
    found = library.found_compiler()
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    return found


def counting(tmp_path: Path, compiler: list[str], then: str = "") -> tuple[Path, Path]:
    """A compiler that notes each of its calls in a file before it works."""
    script, calls = tmp_path / "c++", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{then or f"exec {shlex.join(compiler)}"} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script, calls


def compilations(calls: Path) -> int:
    return sum("-shared" in line for line in calls.read_text().splitlines())


def test_compiled_once_for_later_processes(tmp_path, compiler, monkeypatch):
    script, calls = counting(tmp_path, compiler)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(library, "kernels_folder", lambda: tmp_path / "kernels")
    assert library.loaded() is library.loaded() is not None
    library._loaded.cache_clear()  # as another process
    assert library.loaded() is not None
    assert compilations(calls) == 1
    assert [file.name for file in (tmp_path / "kernels").rglob("*.so")] == [library.loaded_name()]


def test_lanes_that_ask_at_once_compile_once(tmp_path, compiler, monkeypatch):
    script, calls = counting(tmp_path, compiler)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(library, "kernels_folder", lambda: tmp_path / "kernels")
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: library.loaded(), range(4)))
    assert len(found) == 1 and compilations(calls) == 1


def test_other_instructions_are_another_file(tmp_path, compiler):
    for flags in ((), ("-DOTHER",), ()):
        library.load(compiler, tmp_path, flags)
    assert len(list(tmp_path.glob("*.so"))) == 2


@pytest.mark.parametrize("then", ["echo no such flag >&2; exit 1 ;", "sleep 5 ;"], ids=["fails", "hangs"])
def test_a_compiler_that_does_not_do_is_told_and_done_without(then, tmp_path, monkeypatch, caplog):
    script, _ = counting(tmp_path, [], then)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(library, "_LONGEST", 1)
    with caplog.at_level(logging.WARNING, logger=library.__name__):
        assert library.loaded() is None and library.loaded_name() is None
    assert str(script) in caplog.text and ("no such flag" in caplog.text or "timed out" in caplog.text)
    assert trains_by_torch()


@pytest.mark.parametrize(
    "words", ["no-such-compiler", "c++ 'unbalanced", "true"], ids=["absent", "not to be parsed", "no compiler"]
)
def test_a_name_that_is_no_compiler_is_told_and_done_without(words, monkeypatch, caplog):
    monkeypatch.setenv("CXX", words)
    with caplog.at_level(logging.WARNING, logger=library.__name__):
        assert library.loaded() is None
    assert "CXX" in caplog.text and words.split()[0] in caplog.text


@pytest.mark.parametrize("kept", [0, 1000, 60_000, None], ids=str)
def test_a_damaged_file_is_compiled_again(kept, tmp_path, compiler):
    """Cut short, or as long as it was but for some zeros; loaded, it would end the process."""
    library.load(compiler, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    [file] = (tmp_path / "damaged").glob("*.so")
    content = file.read_bytes()
    file.write_bytes(content[:20_000] + bytes(30_000) + content[50_000:] if kept is None else content[:kept])
    assert library.load(compiler, tmp_path / "damaged").vector_width() >= 4
    assert file.stat().st_size == len(content) and library._is_whole(file)


def test_a_file_that_others_could_have_written_is_not_run(tmp_path, compiler):
    script, calls = counting(tmp_path, compiler)
    folder = tmp_path / "kernels"
    library.load([str(script)], folder)
    [file] = folder.glob("*.so")
    file.chmod(0o666)
    library.load([str(script)], folder)
    assert compilations(calls) == 2
    assert not file.stat().st_mode & 0o022
    folder.chmod(0o777)
    library.load([str(script)], folder)
    assert compilations(calls) == 3


def test_a_folder_that_cannot_be_written_costs_a_compilation_each_time(tmp_path, compiler, caplog):
    blocked = tmp_path / "a file"
    blocked.touch()
    with caplog.at_level(logging.INFO, logger=library.__name__):
        assert library.load(compiler, blocked / "kernels").vector_width() >= 4
    assert "cannot be kept" in caplog.text and "warning" not in caplog.text.lower()


def test_a_machine_without_a_compiler(monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.INFO, logger=library.__name__):
        assert library.loaded() is None
    assert "No C++ compiler" in caplog.text
    assert trains_by_torch()


def trains_by_torch() -> bool:
    base = worlds.model("llama", **WIDE)
    return read_layers(base.base_model.requires_grad_(False))[0].passes is cpu_passes


def key_of(base, tmp_path, **engine) -> str | None:
    rows = worlds.pairs(2)
    trainer = worlds.trainer(base, rows, tmp_path)
    return proofs.Proofs(tmp_path, "weights").key(trainer.model, trainer.data_collator(rows), **engine)


def test_a_probe_that_was_passed_by_other_kernels_is_made_again(tmp_path, compiler, monkeypatch):
    keys = []
    for name in ("a", "b"):
        monkeypatch.setattr(proofs, "loaded_name", lambda name=name: name)
        keys.append(key_of(worlds.model(**WIDE), tmp_path))
    monkeypatch.setattr(passes, "threads_are_bound", lambda: True)
    keys.append(key_of(worlds.model(**WIDE), tmp_path))
    assert len(set(keys)) == 3 and None not in keys


@pytest.mark.parametrize(
    ("make", "engine"),
    [
        (lambda: worlds.model(**WIDE).bfloat16(), {}),
        (lambda: worlds.model(**WIDE), {"layers": "plain"}),
        (lambda: worlds.model("gpt2"), {}),
    ],
    ids=["bfloat16", "plain", "gpt2"],
)
def test_what_does_not_use_the_library_does_not_ask_for_it(make, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "loaded", lambda: pytest.fail("compiles"))
    assert key_of(make(), tmp_path, **engine) is not None

"""The C++ of this folder as a library, compiled once for this machine by its own compiler.

It has no Python and no torch in it, so it takes two seconds to compile, and one file serves all versions of either.
A machine without a C++ compiler has no library; nothing needs it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dpo_lora.engine.cache_files import write_atomically
from dpo_lora.resources import kernels_folder

log = logging.getLogger(__name__)

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("attention.cpp", "passes.cpp"))
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("tiles.h", "vectors.h"))
# This machine's own instructions, by the name that its compilers have for them. No fast math: a NaN has to arrive where
# it is looked for.
_OWN = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
_FLAGS = ("-std=c++17", "-O3", _OWN)
_LINK = ("-shared", "-fPIC", "-pthread")
_LONGEST = 120  # seconds for two of work; a compiler that hangs must not hang a run

_lock = threading.Lock()


def loaded() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be made. The compiler is ``$CXX``, else c++, g++ or clang++."""
    with _lock:  # two lanes may ask at once
        return _loaded()


@cache
def _loaded() -> ctypes.CDLL | None:
    compiler = found_compiler()
    if compiler is None:
        log.info("No C++ compiler here: the attention of packed rows is computed by torch's kernel, which is slower.")
        return None
    try:
        return ctypes.CDLL(str(built(compiler, kernels_folder())))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        log.warning(
            "The C++ kernels could not be compiled and loaded, so torch's, which are slower, are used. "
            "Another compiler is taken from CXX. %s said: %s", shlex.join(compiler), str(said).strip()[-1000:],
        )  # fmt: skip
        return None


def compiled_name() -> str | None:
    """The library's file name, which tells its source, its compiler and the processor it is for; None without one."""
    compiled = loaded()
    return None if compiled is None else Path(str(compiled._name)).name


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Call a function of the library: tensors by their addresses, whole numbers as 64 bits, others as floats, and at
    the end how many threads it may use."""
    compiled = loaded()
    assert compiled is not None, "who calls has asked whether there is one"
    compiled[name](*map(_passed, arguments), ctypes.c_int64(torch.get_num_threads()))


def _passed(argument: Tensor | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if argument is not None:
        assert argument.is_contiguous() and argument.device.type == "cpu", "it is read as it lies in memory"
        assert argument.dtype in (torch.float32, torch.int64), "it has no other formats"
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def built(compiler: list[str], folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """The library's file in ``folder``, compiled if it is not there.

    The name is the hash of the source and of all that the compiler predefines, which tells its version and the
    instructions of this processor: in a home folder that machines share, each finds its own.

    Raises:
        OSError, subprocess.SubprocessError: the compiler or the folder does not do.
    """
    flags = (*_FLAGS, *flags)
    predefined = _run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    said = "\0".join([predefined, *flags, *(file.read_text(encoding="utf-8") for file in (*_SOURCES, *_HEADERS))])
    file = folder / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as made:
            part = Path(made) / file.name
            _run([*compiler, *flags, *_LINK, *map(str, _SOURCES), "-o", str(part)])
            write_atomically(file, part.read_bytes())
    return file


def found_compiler() -> list[str] | None:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LONGEST).stdout

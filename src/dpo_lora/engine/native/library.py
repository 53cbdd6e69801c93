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
import stat
import subprocess
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dpo_lora.engine.cache_files import write_atomically
from dpo_lora.resources import kernels_folder

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
# No fast math, whatever CXX says: a NaN has to arrive where it is looked for.
_FLAGS = ("-std=c++17", "-O3", _NATIVE, "-fno-fast-math")
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
        log.info("No C++ compiler (c++, g++, clang++, or what CXX names): layers run on torch's slower operations.")
        return None
    try:
        return load(compiler, kernels_folder() / str(os.getuid()))
    except subprocess.CalledProcessError as error:
        said = f"exit status {error.returncode}. {error.stderr.strip()[-1000:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    log.warning(
        "The C++ kernels could not be compiled and loaded: layers run on torch's slower operations. CXX may name "
        "another compiler. %s: %s", shlex.join(compiler), said,
    )  # fmt: skip
    return None


def load(compiler: list[str], folder: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library from ``folder``, compiled if it is not there, and kept there if that can be.

    Its name is the hash of the source and of all that the compiler predefines, which tells the compiler's version and
    this processor's instructions: in a home folder that machines share, each finds its own.

    Raises:
        OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired: it could not be compiled or not be loaded.
    """
    flags = (*_FLAGS, *flags)
    predefined = _run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    sources = [file.read_text(encoding="utf-8") for kind in ("h", "cpp") for file in sorted(_FOLDER.glob(f"*.{kind}"))]
    name = f"{hashlib.sha256(chr(0).join([predefined, *flags, *sources]).encode()).hexdigest()[:32]}.so"
    file = folder / name
    if _is_whole(file):
        return ctypes.CDLL(str(file))
    log.info("Compiling the C++ kernels for this processor: seconds, and once.")
    with tempfile.TemporaryDirectory() as made:
        part = Path(made) / name
        _run([*compiler, *flags, *_LINK, *map(str, sorted(_FOLDER.glob("*.cpp"))), "-o", str(part)])
        content = part.read_bytes()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(folder):
                raise PermissionError("others may write there")
            write_atomically(file, content)
            write_atomically(_checksum_of(file), hashlib.sha256(content).hexdigest().encode())
            return ctypes.CDLL(str(file))
        except OSError as error:
            log.info("The compiled kernels serve this process alone: they cannot be kept in %s (%s).", folder, error)
        return ctypes.CDLL(str(part))  # what is loaded outlives its file


def _checksum_of(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _is_whole(file: Path) -> bool:
    """Whether the file is what was compiled, by this user: a damaged one would end the process without a word."""
    if not all(map(_is_ours, (file.parent, file, _checksum_of(file)))):
        return False
    with suppress(OSError):
        return hashlib.sha256(file.read_bytes()).hexdigest().encode() == _checksum_of(file).read_bytes()
    return False


def _is_ours(path: Path) -> bool:
    """Whether only this user or root can write here: a cache may be shared, and what lies there would be executed."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid in (0, os.getuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def found_compiler() -> list[str] | None:
    """The words of the compiler's command."""
    named = os.environ.get("CXX", "")
    try:
        words = shlex.split(named)
    except ValueError:  # a quotation without an end: no such compiler, which is then told
        return [named]
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return words or ([found] if found else None)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=_LONGEST)
    return done.stdout


def loaded_name() -> str | None:
    """The library's file name, which tells its source, its compiler and the processor it is for; None without one."""
    compiled = loaded()
    return None if compiled is None else Path(str(compiled._name)).name


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Call a function of the library: tensors by their addresses, whole numbers as 64 bits, others as floats, and at
    the end how many threads it may use.

    Raises:
        MemoryError: it had not enough.
    """
    compiled = loaded()
    assert compiled is not None, "who calls has asked whether there is one"
    if compiled[name](*map(_passed, arguments), ctypes.c_int64(torch.get_num_threads())):
        raise MemoryError(f"not enough memory for {name} of the compiled kernels")


def _passed(argument: Tensor | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if argument is not None:
        assert argument.is_contiguous() and argument.device.type == "cpu", "it is read as it lies in memory"
        assert argument.dtype in (torch.float32, torch.int64), "it has no other formats"
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())

"""The library compiled for this machine, and for the vectors that other machines have."""

from __future__ import annotations

import ctypes
import functools
import platform

import pytest
import torch

from dpo_lora.engine.native import library, passes

CAPABILITY = torch.backends.cpu.get_cpu_capability()
AVX2 = {"avx2": ("-march=haswell",)} if CAPABILITY in ("AVX2", "AVX512") else {}
SSE = {"sse": ("-march=x86-64",)} if platform.machine() in ("x86_64", "AMD64") else {}
VECTORS = {"own": (), **AVX2, **SSE}


@functools.cache
def compiled(vectors: str) -> ctypes.CDLL:
    compiler = library.found_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    return library.load(compiler, library.kernels_folder(), VECTORS[vectors])


@pytest.fixture(params=VECTORS)
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many floats a vector of the library in use has."""
    made = compiled(request.param)
    monkeypatch.setattr(library, "loaded", lambda: made)
    monkeypatch.setattr(passes, "threads_are_bound", lambda: False)
    return made.vector_width()

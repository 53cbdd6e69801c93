"""Matrix products of the pair engine: in float32 on a CPU by the library that is faster there, else by torch's BLAS.

Torch gives float32 products to its BLAS, MKL in the Linux wheels. On Intel's processors that is the faster one, on
others oneDNN, whose kernels are in the same wheel, use AVX-512 on every maker's processors and meet at one barrier a
product, which matters where cores are shared; docs/performance.md has both measured. The choice follows from the
machine and is not timed, so that a run repeats bit for bit. The weights stay as they lie; packing them ahead would keep
each a second time.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def by_onednn() -> bool:
    """Whether float32 products go to oneDNN on this machine."""
    mkldnn = torch.backends.mkldnn  # oneDNN's old name
    return mkldnn.is_available() and bool(mkldnn.enabled) and not (torch.backends.mkl.is_available() and _is_intel())


@cache
def _is_intel() -> bool:
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        described = platform.processor()
    return "GenuineIntel" in described


def linear(x: Tensor, weight: Tensor, start: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in] (any strides) -> x W^T, plus `start` [T, out]; a new tensor."""
    if _goes_to_onednn(x):
        operation = torch.ops.mkldnn._linear_pointwise
        if start is None:
            return operation(x, weight, None, "none", [], "")
        return operation.binary(x, start, weight, None, "add")
    return torch.mm(x, weight.t()) if start is None else torch.addmm(start, x, weight.t())


def add_linear(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`linear` with `total` as its start, which is not needed any more: the sum may lie in its place."""
    return linear(x, weight, total) if _goes_to_onednn(x) else total.addmm_(x, weight.t())


def outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left [T, n], right [T, m] -> left^T right [n, m] in ``dtype``, the sum over T unrounded before that."""
    if left.is_cuda:
        return torch.mm(left.t(), right) if left.dtype is dtype else torch.mm(left.t(), right, out_dtype=dtype)
    if left.dtype is not dtype:
        left, right = left.to(dtype), right.to(dtype)
    if left.shape[1] > right.shape[1]:  # the narrower one comes first
        return _outer(right, left).t()
    return _outer(left, right)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    if _goes_to_onednn(left):
        return linear(left.t().contiguous(), right.t())
    return torch.mm(left.t(), right)


def _goes_to_onednn(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() > 0 and by_onednn()

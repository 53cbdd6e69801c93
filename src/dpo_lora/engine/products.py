"""Matrix products of the pair engine: in float32 on a CPU by the library that is faster there, else by torch's BLAS.

Torch gives float32 products to its BLAS (MKL in the Linux wheels), which is fastest on Intel's processors, and on
those alone: on others oneDNN, whose kernels are in the same wheel, uses AVX-512 where MKL does not, and meets at one
barrier a product, which matters where cores are shared. bench/results say what it gives. Which one is used follows
from the processor alone, so that a run repeats bit for bit. The weights stay as they lie; packing them ahead would
keep each a second time.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def by_onednn() -> bool:
    """Whether float32 products go to oneDNN on this machine's processor."""
    mkldnn = torch.backends.mkldnn  # oneDNN's old name
    if not mkldnn.is_available() or not mkldnn.enabled:
        return False
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        described = platform.processor()
    return not (torch.backends.mkl.is_available() and "GenuineIntel" in described)


def linear(x: Tensor, weight: Tensor, start: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in] (any strides) -> x W^T, plus `start` [T, out]; a new tensor."""
    if x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() and by_onednn():
        operation = torch.ops.mkldnn._linear_pointwise
        if start is None:
            return operation(x, weight, None, "none", [], "")
        return operation.binary(x, start, weight, None, "add")
    return torch.mm(x, weight.t()) if start is None else torch.addmm(start, x, weight.t())

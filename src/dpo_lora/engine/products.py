"""Matrix products of the pair engine: on a CPU in float32 through oneDNN, else through torch's BLAS.

Torch gives float32 products to its BLAS (MKL in the Linux wheels). oneDNN's kernels are in the same wheel, use
AVX-512 on every maker's processors and meet at one barrier a product, which matters where cores are shared:
bench/results say what it gives. The weights stay as they lie; packing them ahead would keep each a second time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, start: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in] (any strides) -> x W^T, plus `start` [T, out]; a new tensor."""
    mkldnn = torch.backends.mkldnn  # oneDNN's old name
    if x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() and mkldnn.is_available() and mkldnn.enabled:
        operation = torch.ops.mkldnn._linear_pointwise
        if start is None:
            return operation(x, weight, None, "none", [], "")
        return operation.binary(x, start, weight, None, "add")
    return torch.mm(x, weight.t()) if start is None else torch.addmm(start, x, weight.t())

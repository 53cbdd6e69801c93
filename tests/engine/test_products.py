"""Products are the same by either library, and the machine alone chooses between them."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_lora.engine import products


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


class Called(TorchDispatchMode):
    """Notes the operations of torch that are called while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.fixture(params=["oneDNN", "BLAS"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "by_onednn", lambda: request.param == "oneDNN")
    torch.manual_seed(0)


def weights() -> list[torch.Tensor]:
    """[3, 5] each: as a layer has it, transposed as in its backward pass, some rows and some columns of a larger."""
    return [torch.randn(3, 5), torch.randn(5, 3).t(), torch.randn(9, 5)[2:5], torch.randn(3, 20)[:, ::4]]


@pytest.mark.usefixtures("library")
def test_both_libraries_compute_the_product() -> None:
    x, start = torch.randn(7, 5), torch.randn(7, 3)
    for weight in weights():
        exact = x.double() @ weight.double().t()
        close(products.linear(x, weight), exact)
        close(products.linear(x, weight, start), exact + start)
        close(products.add_linear(start.clone(), x, weight), exact + start)


@pytest.mark.usefixtures("library")
def test_a_start_is_left_as_it_was() -> None:
    x, weight, start = torch.randn(7, 5), torch.randn(3, 5), torch.randn(7, 3)
    before = start.clone()
    products.linear(x, weight, start)
    assert torch.equal(start, before)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)], ids=str)
def test_both_libraries_sum_over_tokens(shape: tuple[int, int]) -> None:
    """Whichever side is the narrower, also where it is some columns of a wider matrix, as a projection's ranks are."""
    left, right = torch.randn(7, 9)[:, 2 : 2 + shape[0]], torch.randn(7, shape[1])
    for dtype in (torch.float32, torch.float64):
        found = products.outer(left, right, dtype)
        assert found.dtype is dtype
        close(found, left.double().t() @ right.double())


@pytest.mark.usefixtures("library")
def test_sums_of_bfloat16_are_rounded_no_earlier_than_asked() -> None:
    left, right = torch.randn(300, 3).bfloat16(), torch.randn(300, 5).bfloat16()
    close(products.outer(left, right, torch.float32), left.double().t() @ right.double())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_each_library_is_called_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(7, 5), torch.randn(3, 5)
    for onednn in (True, False):
        monkeypatch.setattr(products, "by_onednn", lambda onednn=onednn: onednn)
        with Called() as called:
            products.linear(x, weight)
            products.outer(x, x, torch.float32)
        assert ("mkldnn._linear_pointwise.default" in called.names) is onednn
        assert ("aten.mm.default" in called.names) is not onednn


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_mkl_is_for_intels_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for intel, mkl, onednn in ((True, True, False), (True, False, True), (False, True, True)):
        monkeypatch.setattr(products, "_is_intel", lambda intel=intel: intel)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda mkl=mkl: mkl)
        assert products.by_onednn() is onednn
        with torch.backends.mkldnn.flags(enabled=False):
            assert not products.by_onednn()

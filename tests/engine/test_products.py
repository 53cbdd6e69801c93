"""Products are the same by either library, and the machine alone chooses between them."""

from __future__ import annotations

import pytest
import torch

from dpo_lora.engine import products


@pytest.mark.parametrize("onednn", [True, False])
def test_both_libraries_compute_the_product(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "by_onednn", lambda: onednn)
    x, weight, start = torch.randn(7, 5), torch.randn(3, 5), torch.randn(7, 3)
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(products.linear(x, weight).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products.linear(x, weight, start).double(), exact + start, rtol=1e-5, atol=1e-5)
    turned = products.linear(torch.randn(7, 3), weight.t())
    assert turned.shape == (7, 5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_mkl_is_for_intels_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for intel, mkl, onednn in ((True, True, False), (True, False, True), (False, True, True)):
        monkeypatch.setattr(products, "_is_intel", lambda intel=intel: intel)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda mkl=mkl: mkl)
        assert products.by_onednn() is onednn
        with torch.backends.mkldnn.flags(enabled=False):
            assert not products.by_onednn()

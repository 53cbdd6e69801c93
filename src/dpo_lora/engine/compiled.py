"""Small functions of tensors, compiled where their tensors are on a GPU and run as written elsewhere."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

log = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])
_refused: set[Callable[..., Any]] = set()  # what could not be compiled on this machine, once that was seen


def compiled(*dims: int, vectors: bool = False, few: bool = False) -> Callable[[Function], Function]:
    """A decorator: the function by torch.compile where its first argument is on a GPU.

    Args:
        dims: dimensions of its matrices whose size changes from call to call. The compiler is told, or it would
            compile once for a size and again for all.
        vectors: whether the length of its vectors changes, too.
        few: the other sizes are one of a few (a model's width, a head's). Each gets a kernel that knows it; else the
            second one met makes one for all.
    """

    def decorate(function: Function) -> Function:
        kernel = functools.cache(lambda: _kernel(function, few))

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            if not args[0].is_cuda or run in _refused:
                return function(*args)
            call, mark, refusal = kernel()
            for each in args:
                if isinstance(each, Tensor) and (vectors or each.dim() > 1):
                    for dim in dims[: each.dim()]:
                        mark(each, dim)
            try:
                return call(*args)
            except refusal as error:
                _note(function, error)
                _refused.add(run)
                return function(*args)

        return cast(Function, run)

    return decorate


def _kernel(function: Callable[..., Any], few: bool) -> tuple[Callable[..., Any], Callable[..., Any], type[Exception]]:
    """The function compiled, how to tell it of a size that changes, and what it raises where it cannot be compiled."""
    import torch
    from torch import _dynamo as dynamo  # seconds to import, and of no use on a CPU
    from torch._dynamo.exc import TorchDynamoException

    return torch.compile(function, dynamic=False if few else None), dynamo.maybe_mark_dynamic, TorchDynamoException


def _note(function: Callable[..., Any], error: Exception) -> None:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    name = function.__name__
    log.warning("%s cannot be compiled on this machine, so training is slower than it could be: %s", name, line)

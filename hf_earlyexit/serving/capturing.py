"""What CUDA graphs cannot hold, found without a CUDA device, and numbers of the host that they can."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FROM_NUMBERS: frozenset[Any] = frozenset({torch.tensor, Tensor.new_tensor})
_FROM_ELSEWHERE: frozenset[Any] = frozenset({torch.as_tensor, torch.asarray, torch.from_numpy})
_AT_PLACES = (Tensor.__getitem__, Tensor.__setitem__)
_WHERE = torch.ops.aten.where
_WITH_NUMBERS = (_WHERE.Scalar, _WHERE.ScalarSelf, _WHERE.ScalarOther)  # on CUDA these copy their numbers, and wait


class HeldNumbers(TorchFunctionMode):
    """Inside, a tensor of numbers, by `torch.tensor` or `new_tensor`, is made once; later it is the same one again.

    A graph can hold no copy from the host, but it can read a tensor that was there before and stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[Hashable, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func not in _FROM_NUMBERS:
            return func(*args, **options)
        like = [(one.dtype, one.device) if isinstance(one, Tensor) else _frozen(one) for one in args]
        key = (func, *like, *sorted(options.items()))
        if key not in self.held:
            self.held[key] = func(*args, **options)
        return self.held[key]


def _frozen(numbers: Any) -> Hashable:
    return tuple(map(_frozen, numbers)) if isinstance(numbers, (list, tuple)) else numbers


@contextmanager
def nothing_from_the_host() -> Iterator[None]:
    """Refuse what copies from the host inside, but for what `HeldNumbers` holds; for tensors of the device "meta".

    These have no values, so a look at one is an error, too. To be entered in inference mode, where torch tells of every
    operation.

    Raises:
        AssertionError: for such an operation.
    """
    with _NothingElse(), _NoTensors():  # type: ignore[no-untyped-call]
        yield


class _NothingElse(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        places = args[1] if func in _AT_PLACES else ()
        listed = isinstance(places, list) or (isinstance(places, tuple) and any(isinstance(one, list) for one in places))
        if func in _FROM_ELSEWHERE or listed:
            raise AssertionError(f"{func} copies from the host")
        return func(*args, **(kwargs or {}))


class _NoTensors(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = tree_leaves((args, kwargs or {}))
        host = [one for one in given if isinstance(one, Tensor) and one.device.type == "cpu"]
        if host or func in _WITH_NUMBERS:
            raise AssertionError(f"{func} copies from the host")
        return func(*args, **(kwargs or {}))

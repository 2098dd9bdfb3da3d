"""Values of whole numbers, carried along beside tensors that have none.

A rehearsal computes with tensors of a shape and a dtype and no values. What a program decides by values it
decides, in training, by whole numbers that come from the batch: how many labels are trained, where documents
begin, whether a mask is needed. These are small and are computed beside: a tensor made of tensors whose
values are known has a known value too, as long as it is of integers or booleans, or a single number made of
such (an optimizer's count of steps). Nothing else is known; a number that is asked for all the same (a norm,
an overflow) is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 2**24
"""Elements: values of larger tensors (block masks of long rows) are not kept."""
_NAME = "_rehearsed_value"


def value_of(tensor: Tensor) -> Tensor | None:
    """The known value of a tensor, which is not to be changed; a tensor that is not fake is its own."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(tensor, FakeTensor):
        return vars(tensor).get(_NAME)
    return tensor


def remember(tensor: Tensor, value: Tensor | None) -> None:
    """Say what a fake tensor's value is; None: unknown from now on."""
    if value is None:
        vars(tensor).pop(_NAME, None)
    else:
        vars(tensor)[_NAME] = value


def computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a function gives for values that are all known; None where one is not, or where the result is of
    no interest. Without tensors among the arguments it makes a tensor (`arange`)."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes
    from torch.utils._pytree import tree_map_only

    given = False
    for tensor in _tensors((*args, *kwargs.values())):
        given = True
        value = value_of(tensor)
        if value is None or not is_known(value):
            return None
    if not given and not _makes_small_integers(function, args, kwargs):
        return None
    if any(name in str(function) for name in ("rand", "bernoulli", "c10d", "multinomial")):
        return None
    with _disable_current_modes(), torch.no_grad():
        plain, named = tree_map_only(torch.Tensor, value_of, (args, kwargs))
        return function(*plain, **named)


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Those of an operation of aten, whose arguments are tensors, lists of such, and plain values."""
    import torch

    for one in arguments:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from _tensors(one)


def is_known(value: Tensor) -> bool:
    """Whether such a value is carried along: whole numbers, and a single number, such as an optimizer's count
    of steps."""
    return value.ndim == 0 or (not value.is_floating_point() and value.numel() <= LARGEST)


def _makes_small_integers(function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    import torch

    dtype = kwargs.get("dtype")
    if dtype is None:
        return "arange" in str(function) and not any(isinstance(a, float) for a in args)
    if dtype.is_floating_point or dtype.is_complex:
        return False
    size = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else []
    count = 1
    for length in size:
        count *= int(length)
    return count <= LARGEST

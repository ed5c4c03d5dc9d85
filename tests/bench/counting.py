"""Counts the bytes an op moves from what it does to real tensors, knowing nothing of the op."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def bytes_moved(run: Callable[..., Any], arguments: Sequence[Any]) -> int:
    """Each tensor argument read once, each result written once.

    An argument that the op writes (its version says so) counts twice; a result that is a view of an
    argument is neither read nor written.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    before = [tensor._version for tensor in tensors]
    with torch.no_grad():
        returned = run(*arguments)
    results = returned if isinstance(returned, tuple) else (returned,)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    total = sum(tensor.nbytes for tensor in tensors)
    total += sum(
        t.nbytes for t, version in zip(tensors, before, strict=True) if t._version != version
    )
    for result in results:
        if isinstance(result, Tensor):
            is_view = result.untyped_storage().data_ptr() in storages
            total += -result.nbytes if is_view else result.nbytes
    return total

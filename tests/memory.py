"""How large the tensors are that operations make, how many bytes of them live at a time, and which products they make."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensors that torch's operations make while this is entered; booleans apart."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0
        self.num_bools = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                if tensor.dtype == torch.bool:
                    self.num_bools = max(self.num_bools, elements)
                else:
                    self.num_elements = max(self.num_elements, elements)
        return result


class Products(TorchDispatchMode):
    """The different matrix products that torch's operations make while this is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
            tensors = [(x.shape, x.stride()) for x in args if isinstance(x, torch.Tensor)]
            self.shapes.add((func.overloadpacket, *tensors))
        return func(*args, **(kwargs or {}))


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that torch's operations make while this is entered: those alive, and the most there were.

    `known`: tensors that were there before. What an operation uses for itself is not seen.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, int] = {}
        self.now_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._live and key not in self._known and storage.nbytes():
                    self._live[key] = storage.nbytes()
                    self.now_bytes += self._live[key]
                    weakref.finalize(storage, self._forget, key)
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        return result

    def _forget(self, key: int) -> None:
        self.now_bytes -= self._live.pop(key)

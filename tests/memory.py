"""How large the tensors are that an operation makes."""

from __future__ import annotations

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

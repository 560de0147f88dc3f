"""What ``FakeCuda`` sees of tensors: every operation, and every question of where one is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.cuda._sanitizer import zip_arguments
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fake_cuda_order import HOST

CPU = torch.device("cpu")
#: What reads a host tensor's memory beside operations; the extension asks is_neg() before it looks.
LOOKS = {"numpy", "tolist", "data_ptr", "is_neg", "__array__"}


class Operations(TorchDispatchMode):
    def __init__(self, cuda: Any) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self.cuda.run(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Where tensors are, as the code that is tested sees it, and what takes them elsewhere."""

    def __init__(self, cuda: Any) -> None:
        super().__init__()
        self.cuda = cuda
        self.own: dict[str, Callable[..., Any]] = {
            "to": self._to, "cpu": lambda tensor, *_: self._moved(tensor, CPU), "cuda": self._cuda,
            "pin_memory": self._pin, "is_pinned": lambda tensor, *_: self._is_pinned(tensor),
            "as_tensor": self._as_tensor, "__deepcopy__": self._deepcopy,
            "get_device": lambda tensor: -1 if self.cuda.place(tensor) == CPU else self.cuda.place(tensor).index,
        }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            if func == torch.Tensor.device.__get__:
                return self.cuda.place(args[0])
            if func in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
                return (self.cuda.place(args[0]).type == "cuda") == (func == torch.Tensor.is_cuda.__get__)
            return func(*args, **kwargs)
        if name in self.own:
            return self.own[name](*args, **kwargs)
        if name in LOOKS:
            self._looked_at(args[0], name)
        if kwargs.get("device") is not None or kwargs.get("pin_memory"):
            return self._made(func, args, kwargs)
        return func(*args, **kwargs)

    def _made(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        device, pinned = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
        device = CPU if device is None else self.cuda.resolve(device)
        if device.type not in ("cpu", "cuda"):
            return func(*args, device=device, **kwargs)
        before, self.cuda.placing = self.cuda.placing, device
        try:
            made = func(*args, **kwargs)
        finally:
            self.cuda.placing = before
        if pinned:
            self.cuda.register(made, CPU, pinned=True)
        elif device != CPU and self.cuda.memory(made) is None:
            # torch.tensor: numbers of the host, for whose copy it waits.
            return self._moved(made, device)
        return made

    def _moved(self, tensor: torch.Tensor, device: torch.device, non_blocking: bool = False, **kind: Any) -> Any:
        if self.cuda.place(tensor) == device:
            return tensor
        with torch._C._DisableTorchDispatch():
            made = torch.empty_like(tensor, requires_grad=False, **kind)
        self.cuda.register(made, device)
        return made.copy_(tensor, non_blocking=non_blocking)

    def _to(self, tensor: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.Tensor):
            args = (self.cuda.place(args[0]), args[0].dtype, *args[1:])
        if isinstance(kwargs.get("device"), int) or (args and type(args[0]) is int):
            args, kwargs["device"] = args[1:], torch.device("cuda", kwargs.get("device", *args[:1]))
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        kind: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if memory_format is not None:
            kind["memory_format"] = memory_format
        here = self.cuda.place(tensor)
        target = here if device is None else self.cuda.resolve(device)
        if target.type not in ("cpu", "cuda"):
            return tensor.to(*args, copy=copy, **kwargs)
        if target != here:
            return self._moved(tensor, target, non_blocking, **kind)
        return tensor.to(tensor.device, copy=copy, **kind)

    def _cuda(self, tensor: torch.Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> torch.Tensor:
        return self._moved(tensor, self.cuda.resolve("cuda" if device is None else device), non_blocking)

    def _as_tensor(self, data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
        if not isinstance(data, torch.Tensor):
            made = torch.as_tensor(data, dtype=dtype)
            return made if device is None else self._moved(made, self.cuda.resolve(device))
        return self._to(data, self.cuda.place(data) if device is None else device, dtype or data.dtype)

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        memory = self.cuda.memory(tensor)
        return memory is not None and memory.pinned

    def _pin(self, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        if self.cuda.place(tensor) != CPU:
            raise RuntimeError("cannot pin a CUDA tensor: only dense CPU tensors can be pinned")
        if self._is_pinned(tensor):
            return tensor
        made = tensor.clone()
        self.cuda.register(made, CPU, pinned=True)
        return made

    def _deepcopy(self, tensor: torch.Tensor, memo: Any) -> torch.Tensor:
        with torch._C._DisableTorchDispatch():
            made = tensor.__deepcopy__(memo)
        if self.cuda.place(tensor) != CPU and self.cuda.memory(made) is None:
            self.cuda.register(made, self.cuda.place(tensor))
        return made

    def _looked_at(self, tensor: torch.Tensor, name: str) -> None:
        memory = self.cuda.memory(tensor)
        if memory is not None and memory.device == CPU:
            self.cuda.launch(HOST, name, {memory.key}, set())
        elif memory is not None and name == "tolist":
            self.cuda.wait_for_streams(list(self.cuda.streams), name)
        elif memory is not None and name in ("numpy", "__array__"):
            raise TypeError(f"can't convert {memory.device} device type tensor to numpy. Use Tensor.cpu() first")


def accesses(func: Any, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that an operation reads, and those among its arguments that it writes."""
    reads: list[torch.Tensor] = []
    writes: list[torch.Tensor] = []
    # These look at shapes only.
    if func._schema.name.endswith("_like") or func._schema.name.startswith("aten::new_"):
        return reads, writes
    for argument, value in zip_arguments(func._schema, args, kwargs):
        tensors = [one for one in tree_leaves(value) if isinstance(one, torch.Tensor)]
        if argument.alias_info is None:
            reads += tensors
        elif argument.alias_info.is_write:
            writes += tensors
    return reads, writes

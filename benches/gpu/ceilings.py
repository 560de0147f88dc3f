"""What the device can do at best: products of matrices and copies, by which the rest is judged."""

from collections.abc import Callable, Iterator

import torch
from measure import Contender

from gpu import part
from gpu.scale import Scale
from gpu.titles import COPIES, PRODUCTS
from gpu.trial import Trial

#: Type and whether tensor cores may round float32 to TF32, by the name of a precision.
KINDS = {
    "exact": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
}
#: Products per round, copies per round.
TIMES = 20


def trials(scale: Scale) -> Iterator[Trial]:
    """Both, each the best that PyTorch reaches."""
    products = [Contender(name, product(scale, *kind)) for name, kind in KINDS.items()]
    yield Trial(PRODUCTS, "TFLOP/s", products, rounds=5)
    yield Trial(COPIES, "GB/s", [Contender(name, run) for name, run in copies(scale).items()], rounds=5)


def product(scale: Scale, dtype: torch.dtype, precision: str) -> Callable[[], float]:
    """Square matrices of random numbers; of zeros the device would draw less power and be faster."""
    a, b = (torch.randn(scale.side, scale.side, device=scale.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> float:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            for _ in range(TIMES):
                torch.mm(a, b, out=out)
            scale.wait()
        finally:
            torch.set_float32_matmul_precision(before)
        return TIMES * 2 * scale.side**3 / 1e12

    return run


def copies(scale: Scale) -> dict[str, Callable[[], float]]:
    """To the device and back, from page-locked memory and from other memory; and within the device."""
    size = scale.megabytes * 2**20
    on_device, other = (torch.zeros(size, dtype=torch.uint8, device=scale.device) for _ in range(2))
    pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=scale.device == "cuda")
    pageable = torch.zeros(size, dtype=torch.uint8)

    def copy(target: torch.Tensor, source: torch.Tensor, crossings: int = 1) -> Callable[[], float]:
        def run() -> float:
            for _ in range(TIMES):
                target.copy_(source, non_blocking=True)
            scale.wait()
            return crossings * TIMES * size / 1e9

        return run

    return {
        "pinned to device": copy(on_device, pinned),
        "pageable to device": copy(on_device, pageable),
        "device to pinned": copy(pinned, on_device),
        "device to pageable": copy(pageable, on_device),
        "within the device, read and written": copy(other, on_device, crossings=2),
    }


if __name__ == "__main__":
    part.main("ceilings", trials)

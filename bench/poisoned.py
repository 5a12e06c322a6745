"""Pipelines that end badly on a GPU, and one that does not, for bench/faults.py and tests/test_gpu.py."""

from collections.abc import Callable
from typing import Any

import pytest

GIB = 1 << 30


def build() -> Any:
    import torch

    return torch.zeros(1 << 20, device="cuda")


def device_side_assert(pipe: Any) -> None:
    """An index out of range, which only the kernel sees."""
    import torch

    pipe[torch.tensor([1 << 21], device="cuda")].sum().item()


def illegal_address(pipe: Any) -> None:
    """Memory is written that was given back to the driver."""
    import torch

    address = torch.empty(GIB, dtype=torch.uint8, device="cuda").data_ptr()
    torch.cuda.empty_cache()
    storage = torch._C._construct_storage_from_data_pointer(address, torch.device("cuda", 0), GIB)
    freed: Any = torch.empty(0, dtype=torch.uint8, device="cuda")
    freed.set_(storage, 0, (GIB,)).fill_(1)
    torch.cuda.synchronize()


def out_of_memory(pipe: Any) -> None:
    """32 TiB are asked for."""
    import torch

    torch.empty(1 << 45, dtype=torch.uint8, device="cuda")


def spin(pipe: Any) -> None:
    """A kernel that runs for about a minute."""
    import torch

    torch.cuda._sleep(10**11)
    torch.cuda.synchronize()


def healthy(pipe: Any) -> Any:
    return pipe + 1


@pytest.mark.parametrize("call", [device_side_assert, illegal_address, out_of_memory, spin, healthy])
def test_pipeline(vram: Any, call: Callable[[Any], Any]) -> None:
    vram.measure(build, call)

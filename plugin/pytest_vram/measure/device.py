"""Clock and memory counters of what runs a pipeline, as its worker reads them."""

import time
from typing import Any, Protocol

import torch


class Device(Protocol):
    """Clock and memory counters of what runs the pipeline."""

    def mark(self) -> Any: ...

    def seconds(self, begin: Any, end: Any) -> float: ...

    def synchronize(self) -> None: ...

    def take_peak(self) -> int | None:
        """The allocated peak in bytes since the last call of this method."""

    def totals(self) -> dict[str, int | None]: ...

    def out_of_memory_errors(self) -> int: ...


class Cuda:
    """Time by CUDA events, memory by PyTorch's allocator."""

    name = "cuda"

    def __init__(self) -> None:
        self._allocated_peak = self._reserved_peak = 0

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def take_peak(self) -> int | None:
        stats = torch.cuda.memory_stats()
        peak = stats.get("allocated_bytes.all.peak", 0)
        self._allocated_peak = max(self._allocated_peak, peak)
        self._reserved_peak = max(self._reserved_peak, stats.get("reserved_bytes.all.peak", 0))
        torch.cuda.reset_peak_memory_stats()
        return peak or None

    def totals(self) -> dict[str, int | None]:
        self.take_peak()
        return {
            "allocated_peak_bytes": self._allocated_peak or None,
            "reserved_peak_bytes": self._reserved_peak or None,
            "reserved_bytes": torch.cuda.memory_reserved(),
            "alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries"),
        }

    def out_of_memory_errors(self) -> int:
        return int(torch.cuda.memory_stats().get("num_ooms", 0))


class Cpu:
    """Time by the wall clock; the host has no allocator statistics."""

    name = "cpu"

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        return float(end - begin)

    def synchronize(self) -> None:
        return None

    def take_peak(self) -> int | None:
        return None

    def totals(self) -> dict[str, int | None]:
        return {}

    def out_of_memory_errors(self) -> int:
        return 0


def device_of(name: str) -> Device:
    """The counters of `cuda` or `cpu`."""
    return Cuda() if name == "cuda" else Cpu()

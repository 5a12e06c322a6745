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

    def totals(self) -> dict[str, Any]:
        """Bytes; of several GPUs the highest, and under `gpus` those of each."""

    def out_of_memory_errors(self) -> int: ...


class Cuda:
    """Time by CUDA events on the first GPU, memory by PyTorch's allocator on all that it uses."""

    name = "cuda"

    def __init__(self, gpus: int = 1) -> None:
        self._allocated_peaks, self._reserved_peaks = [0] * gpus, [0] * gpus

    def mark(self) -> torch.cuda.Event:
        stream = torch.cuda.current_stream(0)
        for gpu in self._gpus()[1:]:  # what they have been given before this mark counts as before it
            stream.wait_event(torch.cuda.current_stream(gpu).record_event())
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000

    def synchronize(self) -> None:
        for gpu in self._gpus():
            torch.cuda.synchronize(gpu)

    def take_peak(self) -> int | None:
        highest = 0
        for gpu in self._gpus():
            stats = torch.cuda.memory_stats(gpu)
            peak = stats.get("allocated_bytes.all.peak", 0)
            highest = max(highest, peak)
            self._allocated_peaks[gpu] = max(self._allocated_peaks[gpu], peak)
            reserved = stats.get("reserved_bytes.all.peak", 0)
            self._reserved_peaks[gpu] = max(self._reserved_peaks[gpu], reserved)
            torch.cuda.reset_peak_memory_stats(gpu)
        return highest or None

    def totals(self) -> dict[str, Any]:
        self.take_peak()
        retries = [torch.cuda.memory_stats(gpu).get("num_alloc_retries") for gpu in self._gpus()]
        each = [
            {
                "allocated_peak_bytes": self._allocated_peaks[gpu] or None,
                "reserved_peak_bytes": self._reserved_peaks[gpu] or None,
                "reserved_bytes": torch.cuda.memory_reserved(gpu),
                "alloc_retries": retries[gpu],
            }
            for gpu in self._gpus()
        ]
        if len(each) == 1:
            return each[0]
        highest = {name: max(gpu[name] or 0 for gpu in each) or None for name in each[0]}
        return {**highest, "alloc_retries": sum(filter(None, retries)), "gpus": each}

    def out_of_memory_errors(self) -> int:
        return sum(int(torch.cuda.memory_stats(gpu).get("num_ooms", 0)) for gpu in self._gpus())

    def _gpus(self) -> range:
        return range(len(self._allocated_peaks))


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

    def totals(self) -> dict[str, Any]:
        return {}

    def out_of_memory_errors(self) -> int:
        return 0


def device_of(name: str, gpus: int = 1) -> Device:
    """The counters of `cuda`, on the first so many GPUs, or `cpu`."""
    return Cuda(gpus) if name == "cuda" else Cpu()

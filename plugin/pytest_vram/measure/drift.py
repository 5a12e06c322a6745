"""What grows from call to call in one process, and does not come back: memory that leaks."""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pytest_vram.records.schema import Drift, Leak, Record

LEAST_CALLS, MOST_CALLS = 3, 10_000
WARM_CALLS = 2  # what they leave behind stays: kernels, caches, the pool's first blocks
CONFIDENCE = 0.95
MOST_READINGS = 1000  # that are compared with each other: of more, every second, third, ...

# PyTorch's figures are exact, and any growth is one. Python and the C library take host memory in pieces and keep some:
# 20 calls of a tiny Stable Diffusion on a CPU, which keeps nothing: 67 KiB a call (35 to 103), 1.2 MiB in all.
HOST_PER_CALL_BYTES = 256 << 10
HOST_IN_ALL_BYTES = 4 << 20

NO_ALLOCATOR = "the CPU has no allocator statistics; host memory and live tensors were counted"


# In the worker


def readings(call: Callable[[], object], calls: int, gpus: int) -> dict[str, list[int]]:
    """What the process holds before and after each of `calls` calls, once it is warm, by what is counted: bytes on so
    many GPUs together, live tensors, bytes of anonymous host memory."""
    for _ in range(WARM_CALLS):
        call()
    found = [held(gpus)]
    for _ in range(calls):
        call()
        found.append(held(gpus))
    return {name: [one[name] for one in found] for name in found[0]}


def held(gpus: int) -> dict[str, int]:
    """What this process holds now; what Python can collect does not count."""
    import torch

    gc.collect()
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    found = {"tensors": tensors, "host": host_bytes()}
    if gpus:
        found["allocated"] = sum(torch.cuda.memory_allocated(gpu) for gpu in range(gpus))
        found["reserved"] = sum(torch.cuda.memory_reserved(gpu) for gpu in range(gpus))
    return found


def host_bytes() -> int:
    """Resident memory that is backed by no file, where Linux tells it; else all that is resident."""
    import psutil

    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("RssAnon:"):  # proc(5); kibibytes
                return int(line.split()[1]) << 10
    return int(psutil.Process().memory_info().rss)


# In the pytest process


def growth(values: Sequence[float]) -> tuple[float, float, float]:
    """How much a figure grows from one reading to the next: the median of all slopes between two of them (Theil and
    Sen), and the ends of its 95 % interval (Sen 1968, with the normal approximation to Kendall's statistic)."""
    stride = 1 + (len(values) - 1) // MOST_READINGS
    values = values[::stride]
    slopes = sorted((b - a) / (j - i) / stride for (i, a), (j, b) in combinations(enumerate(values), 2))
    count = len(values)
    deviation = (count * (count - 1) * (2 * count + 5) / 18) ** 0.5
    width = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * deviation
    low, high = round((len(slopes) - width) / 2) - 1, round((len(slopes) + width) / 2)
    return statistics.median(slopes), slopes[max(0, low)], slopes[min(high, len(slopes) - 1)]


def drift_of(found: Mapping[str, Sequence[int]]) -> Drift:
    """What the readings of a worker say."""
    leaks: list[Leak] = []
    figures: dict[str, Any] = {}
    kinds: tuple[Leak, ...] = ("allocated", "reserved", "tensors", "host")
    for kind in kinds:
        if kind not in found:
            continue
        slope, least, _ = growth(found[kind])
        figures["tensors_per_call" if kind == "tensors" else f"{kind}_bytes_per_call"] = slope
        in_all = found[kind][-1] - found[kind][0]
        if kind == "host":
            leaks += [kind] if least > HOST_PER_CALL_BYTES and in_all > HOST_IN_ALL_BYTES else []
        elif least > 0 and in_all > 0:
            leaks.append(kind)
    return Drift(calls=len(found["host"]) - 1, leaks=leaks, **figures)


def with_drift(record: Record, outcome: Mapping[str, Any], device: str) -> Record:
    """The record with what the worker of a leak check reported."""
    if outcome.get("event") != "done":
        return without_drift(record, f"{outcome.get('status', 'error')} in the leak check: {outcome['message']}")
    missing = {} if device == "cuda" else dict.fromkeys(UNCOUNTED_ON_CPU, NO_ALLOCATOR)
    update = {"drift": drift_of(outcome["drift"]), "unavailable": {**record.unavailable, **missing}}
    return record.model_copy(update=update)


UNCOUNTED_ON_CPU = ("drift.allocated_bytes_per_call", "drift.reserved_bytes_per_call")


def without_drift(record: Record, reason: str) -> Record:
    """The record as it is, with the reason why it has no leak check."""
    return record.model_copy(update={"unavailable": {**record.unavailable, "drift": reason[:2000]}})

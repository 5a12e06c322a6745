"""The counters of several GPUs; CUDA is played."""

from typing import Any

import pytest
import torch

from pytest_vram.measure.device import Cuda, device_of


class Stream:
    def __init__(self, gpu: int, told: list[Any]) -> None:
        self.gpu, self.told = gpu, told

    def record_event(self) -> str:
        self.told.append(("record", self.gpu))
        return f"event of {self.gpu}"

    def wait_event(self, event: str) -> None:
        self.told.append((self.gpu, "waits for", event))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    told: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self, stream: Stream) -> None:
            told.append(("mark", stream.gpu))

    stats = [{"allocated_bytes.all.peak": 5, "reserved_bytes.all.peak": 6, "num_alloc_retries": 1, "num_ooms": 1}]
    stats += [{"allocated_bytes.all.peak": 7, "reserved_bytes.all.peak": 8, "num_alloc_retries": 2, "num_ooms": 0}]
    for name, function in {
        "current_stream": lambda gpu: Stream(gpu, told),
        "Event": Event,
        "synchronize": lambda gpu: told.append(("synchronize", gpu)),
        "memory_stats": lambda gpu: stats[gpu],
        "memory_reserved": lambda gpu: stats[gpu]["reserved_bytes.all.peak"],
        "reset_peak_memory_stats": lambda gpu: told.append(("reset", gpu)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return told


def test_a_mark_comes_after_what_other_gpus_have_been_given(told: list[Any]) -> None:
    device_of("cuda", 2).mark()
    assert told == [("record", 1), (0, "waits for", "event of 1"), ("mark", 0)]
    told.clear()
    device_of("cuda").mark()
    assert told == [("mark", 0)]


def test_totals_are_the_highest_of_any_gpu_and_those_of_each(told: list[Any]) -> None:
    device = Cuda(2)
    assert device.take_peak() == 7
    totals = device.totals()
    assert (totals["allocated_peak_bytes"], totals["reserved_peak_bytes"], totals["alloc_retries"]) == (7, 8, 3)
    assert [gpu["allocated_peak_bytes"] for gpu in totals["gpus"]] == [5, 7]
    assert device.out_of_memory_errors() == 1
    assert "gpus" not in Cuda().totals()


def test_all_gpus_are_waited_for(told: list[Any]) -> None:
    Cuda(2).synchronize()
    assert told == [("synchronize", 0), ("synchronize", 1)]

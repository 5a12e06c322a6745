"""The worker's rounds: as many as are asked for, and again what ran on a throttled GPU."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_vram.measure import generation
from pytest_vram.measure.generation import _agreed, _Generation, _highest


class Played(_Generation):
    """Calls that take no time, and a pytest process that says which of them were throttled; `left_s` to the timeout."""

    def __init__(self, throttled: Sequence[int], left_s: float = 1000.0, call_s: float = 0.0) -> None:
        self.deadline = time.monotonic() + left_s
        self.throttled, self.call_s = set(throttled), call_s
        self.reporter: Any = self
        self.events: list[str] = []
        self.calls = 0

    def call(self, pipe: Any, steps: int | None = None, keep_output: bool = False) -> dict[str, float]:
        time.sleep(self.call_s)
        assert self.output is None  # nothing is held while rounds run
        self.calls += 1
        self.output = self.calls if keep_output else None
        self.events.append("call")
        return {"call": float(self.calls)}

    def send(self, event: str, **fields: Any) -> None:
        assert (event, fields) == ("round", {"index": self.calls - 1})

    def ask(self, event: str) -> dict[str, Any]:
        self.events.append(event)
        return {"throttled": sorted(self.throttled & set(range(self.calls)))}


@pytest.mark.parametrize(
    ("throttled", "batches"),
    [
        ((), [3]),
        ((1,), [3, 1]),
        ((0, 2), [3, 2]),
        ((1, 3), [3, 1, 1]),  # the repeated one was throttled, too
        ((0, 1, 2), [3, 3]),
        ((2, 3, 4, 5, 6, 7), [3, 1, 1, 1]),  # no more than twice as many as were asked for
        (range(10), [3, 3]),
    ],
)
def test_throttled_rounds_are_repeated_in_batches(throttled: Sequence[int], batches: list[int]) -> None:
    played = Played(throttled)
    durations = played.rounds(None, 3)
    assert "|".join(played.events) == "|".join("call|" * batch + "rounds_over" for batch in batches)
    assert [one["call"] for one in durations] == list(range(1, sum(batches) + 1))
    assert played.output == sum(batches)  # that of the last


def test_no_round_is_repeated_beyond_the_timeout() -> None:
    assert len(Played(range(10), left_s=0.0).rounds(None, 3)) == 3
    assert 3 < len(Played(range(20), left_s=0.09, call_s=0.01).rounds(None, 5)) < 10


def test_processes_that_run_together_repeat_what_any_of_them_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    other = iter([[1, 0, 0, -9], [1, 0, 0, 0, 1, 0]])  # the second time it has no time left

    def highest(numbers: Sequence[int]) -> list[int]:
        return [max(pair) for pair in zip(numbers, next(other), strict=True)]

    monkeypatch.setattr(generation, "_highest", highest)
    assert len(Played([1]).rounds(None, 3)) == 5


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_alone_a_process_says_what_is_so() -> None:
    assert (_agreed(7), _highest([3, -1])) == (7, [3, -1])


@pytest.mark.usefixtures("group")
def test_so_does_a_group_of_one() -> None:
    assert (_agreed(7), _highest([3, -1])) == (7, [3, -1])

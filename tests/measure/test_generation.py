"""What a worker reports of a failure, whatever the failure has spoilt."""

from typing import Any

import pytest

from pytest_vram.cases.models import Model
from pytest_vram.measure import generation
from pytest_vram.measure.device import Cpu
from pytest_vram.measure.job import job_of
from tests.measure.test_measurement import case_of

ASSERT = "CUDA error: device-side assert triggered"


class Spoilt(Cpu):
    """Counters of a GPU whose context an error has spoilt: every call gives that error again."""

    def totals(self) -> dict[str, Any]:
        raise RuntimeError(ASSERT)

    def out_of_memory_errors(self) -> int:
        raise RuntimeError(ASSERT)


class Heard:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def send(self, event: str, **fields: Any) -> None:
        self.told.append({"event": event, **fields})

    def ask(self, event: str, **fields: Any) -> dict[str, Any]:
        self.send(event, **fields)
        return {}


@pytest.mark.parametrize("full", [False, True], ids=["", "and a full disk"])
def test_an_error_that_spoils_the_context_is_still_reported(
    tiny: Model, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def load(self: Any) -> None:
        self.device = Spoilt()
        raise RuntimeError(ASSERT)

    monkeypatch.setattr(generation._Generation, "load", load)
    if full:
        monkeypatch.setattr("traceback.print_exception", no_room)
    job = {**job_of(case_of("fp32"), tiny), "device": "cpu", "timeout_s": 60.0}
    reporter: Any = Heard()
    generation.run(job, reporter)
    (failure,) = reporter.told
    assert failure["event"] == "failed"
    assert (failure["status"], failure["swallowed"], failure["phase"]) == ("error", False, "load")
    assert failure["message"] == f"RuntimeError: {ASSERT}"

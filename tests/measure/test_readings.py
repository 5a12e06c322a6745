"""Drivers that fail or lie while a case is measured: figures become null with a reason, and the record stays."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pytest_vram.measure import energy, nvml
from pytest_vram.measure.forkserver import ForkServer
from pytest_vram.measure.readings import NOT_LISTED, STOPPED
from pytest_vram.records.schema import Record
from tests.measure.tasks import MIB
from tests.measure.test_measurement import CARD, IDLE, Card, Stage

FIGURES = ("nvml_process_peak_bytes", "nvml_device_peak_bytes", "context_bytes")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(["tests.measure.tasks"])
    yield server
    server.close()


class Liar(Card):
    """A card whose driver answers as it is told; `asked` counts the questions about memory while a worker lives."""

    def __init__(self, **answers: Callable[[Any], Any]) -> None:
        super().__init__()
        self.answers = answers
        self.asked = 0

    def _says(self, name: str, truth: Any) -> Any:
        return self.answers[name](truth) if name in self.answers else truth

    def used_bytes(self) -> int | None:
        if self._worker():
            self.asked += 1
        used: int | None = self._says("used", super().used_bytes())
        return used

    def processes(self) -> dict[int, int | None]:
        found: dict[int, int | None] = self._says("processes", super().processes())
        return found

    def state(self) -> nvml.State:
        found: nvml.State = self._says("state", super().state())
        return found


def measured(server: ForkServer, card: Liar, **facts: Any) -> tuple[Record, list[int | None], list[str | None]]:
    """The record, NVML's figures in MiB and the reasons where there are none; the rest of the record is whole."""
    stage = Stage(server, "cuda", card)
    stage.machine.facts |= facts
    record = stage.measure()
    assert record.status == "ok", record.failure
    assert (record.memory.allocated_peak_bytes, record.memory.reserved_peak_bytes) == (500 * MIB, 600 * MIB)
    assert len(record.time.workers[0].rounds_s) == 3
    figures = [getattr(record.memory, name) for name in FIGURES]
    reasons = [record.unavailable.get(f"memory.{name}") for name in FIGURES]
    assert [figure is None for figure in figures] == [reason is not None for reason in reasons]
    return record, [figure and figure // MIB for figure in figures], reasons


def with_bytes(used: int | None) -> Callable[[dict[int, int | None]], dict[int, int | None]]:
    return lambda found: dict.fromkeys(found, used)


def test_a_driver_that_tells_the_truth(server: ForkServer) -> None:
    assert measured(server, Liar())[1] == [1000, 1000, 400]


def test_a_driver_that_stops_answering_half_way(server: ForkServer) -> None:
    card = Liar()
    card.answers = {
        "used": lambda truth: truth if card.asked < 3 else None,
        "processes": lambda truth: truth if card.asked < 3 else {},
        "state": lambda truth: nvml.State(None, None, None, None),
    }
    record, figures, reasons = measured(server, card)
    assert figures == [None] * 3
    assert reasons == [STOPPED] * 3
    names = ("sm_clock_mhz", "temperature_c", "power_w", "throttle")
    assert [record.unavailable[f"telemetry.{name}"] for name in names] == [
        *["NVML does not tell it"] * 3,
        "NVML does not tell it: throttled rounds were not seen",
    ]
    assert record.disturbed is None


def test_a_driver_that_does_not_answer_once(server: ForkServer) -> None:
    card = Liar()
    card.answers = {"used": lambda truth: truth if card.asked != 3 else None}
    assert measured(server, card)[1] == [1000, 1000, 400]


def test_processes_that_are_no_longer_told(server: ForkServer) -> None:
    card = Liar()
    card.answers = {"processes": lambda truth: truth if card.asked < 3 else {}}
    _, figures, reasons = measured(server, card)
    assert figures == [None, 1000, 400]  # the device stands in
    assert reasons[0] == STOPPED


def test_a_driver_that_never_tells_memory(server: ForkServer) -> None:
    silent = Liar(used=lambda truth: None, processes=lambda truth: {})
    why = "NVML does not tell the memory in use"
    assert measured(server, silent)[1:] == ([None] * 3, [why] * 3)
    why += ": the GPU has none of its own"
    assert measured(server, silent, unified_memory=True)[1:] == ([None] * 3, [why] * 3)


def test_a_driver_that_tells_processes_and_no_memory(server: ForkServer) -> None:
    _, figures, reasons = measured(server, Liar(used=lambda truth: None))
    assert figures == [1000, None, 400]
    assert reasons[1] == "NVML does not tell the memory in use"


@pytest.mark.parametrize("used", [None, 0])
def test_a_process_without_its_bytes(server: ForkServer, used: int | None) -> None:
    _, figures, reasons = measured(server, Liar(processes=with_bytes(used)))
    assert figures == [None, 1000, 400]
    assert reasons[0] == NOT_LISTED


def test_a_device_that_says_0(server: ForkServer) -> None:
    _, figures, reasons = measured(server, Liar(used=lambda truth: 0))
    assert figures == [1000, None, 400]
    assert reasons[1] == "NVML told no more memory in use than before"


def test_figures_above_the_card_are_not_shown(server: ForkServer) -> None:
    much = CARD + MIB
    _, figures, reasons = measured(
        server, Liar(processes=with_bytes(much), used=lambda truth: IDLE + much if truth > IDLE else IDLE)
    )
    assert figures[:2] == [None, None]
    assert reasons[0] == reasons[1] == f"NVML's highest reading, {much}, is more than the GPU has"


def test_a_device_below_what_pytorch_had_is_not_shown(server: ForkServer) -> None:
    _, figures, reasons = measured(server, Liar(used=lambda truth: min(truth, IDLE + 500 * MIB)))
    assert figures == [1000, None, 400]
    assert "is below what PyTorch had reserved" in str(reasons[1])


def test_a_process_that_comes_during_a_case_disturbs_it(server: ForkServer) -> None:
    card = Liar()
    card.answers = {"processes": lambda truth: {**truth, **({4242: MIB} if 3 < card.asked < 6 else {})}}
    record, figures, _ = measured(server, card)
    assert figures == [1000, 1000, 400]
    assert record.disturbed == "other processes used the GPU meanwhile (pid 4242)"
    assert record.unavailable["energy_j_per_image"] == "other processes used the GPU meanwhile"


def test_a_process_that_comes_during_the_search_disturbs_the_case(server: ForkServer) -> None:
    card = Card()
    card.others = lambda worker: [4242] if worker == 3 else []  # the second probe
    record = Stage(server, "cuda", card).search()
    assert record.memory.need_bytes
    assert record.disturbed == "other processes used the GPU while the need was searched (pid 4242)"


# Energy


def metered(joules_each: float = 200.0) -> Card:
    card = Card()
    card.energy = lambda: 1 + int(card.rounds_over * joules_each * 1000)
    return card


def test_energy_of_an_image(server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "TRUSTED_S", 0.1)
    stage = Stage(server, "cuda", metered())
    stage.machine.facts["power_limit_w"] = 10_000.0
    record = stage.measure(round_s=0.04)
    assert record.energy_j_per_image == pytest.approx(100)  # a round of 200 J makes two images
    assert "energy_j_per_image" not in record.unavailable


@pytest.mark.parametrize(
    ("facts", "script", "why"),
    [
        ({}, {}, "the counter means little over less than 2 s"),
        ({"mig": True}, {}, "under MIG the counter is that of the whole GPU"),
        ({}, {"done": {"images": None}}, "it is not known how many images a call makes"),
        ({}, {"failed": {"status": "oom", "phase": "decode", "message": "x"}}, "no round was completed: oom"),
    ],
)
def test_why_there_is_no_energy(server: ForkServer, facts: Any, script: dict[str, Any], why: str) -> None:
    stage = Stage(server, "cuda", metered())
    stage.machine.facts |= facts
    record = stage.measure(**script)
    assert record.energy_j_per_image is None
    assert why in record.unavailable["energy_j_per_image"]


# Windows


def test_more_than_the_card_has_spilled_where_windows_does_so(server: ForkServer) -> None:
    much = {"allocated_peak_bytes": CARD, "reserved_peak_bytes": CARD + 600 * MIB}
    stage = Stage(server, "cuda", Card())
    assert stage.search(done=much).status == "error"
    stage.machine.facts["spills"] = "WSL"
    record = stage.search(done=much)
    assert record.status == "ok"
    assert str(record.disturbed).endswith("is more than the GPU has (16777216000): Windows moved memory to the host")
    assert (
        record.unavailable["memory.need_bytes"]
        == "the case took more than the GPU has: Windows moved memory to the host"
    )
    assert len(stage.starter.pids) == 2  # no probe

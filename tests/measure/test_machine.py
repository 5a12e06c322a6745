"""What a session starts, in which order, and what it asks once; workers, NVML and locks are played."""

import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pytest_vram.errors import UsageError
from pytest_vram.measure import machine as module
from pytest_vram.measure import nvml
from pytest_vram.measure.locking import NotLocked
from pytest_vram.measure.machine import Machine, start_machine
from tests.measure.tasks import MIB
from tests.measure.test_locking import Named

CANARY = {
    "event": "available",
    "name": "NVIDIA H100",
    "memory_bytes": 80_000 * MIB,
    "integrated": False,
    "uuid": "a",
    "uuids": ["a", "b"],
    "capability": "9.0",
    "cuda": "13.0",
    "cudnn": "91000",
    "reserved_bytes": 20 * MIB,
}


class Gpu(Named):
    """An idle GPU, but for `others`."""

    others: dict[int, int | None] = {}

    def processes(self) -> dict[int, int | None]:
        return self.others

    def used_bytes(self) -> int | None:
        return 500 * MIB

    def power_limit_w(self) -> float | None:
        return 700.0

    def mig(self) -> bool | None:
        return False

    def driver_model(self) -> str | None:
        return None


class Played:
    """Server, worker, its channel, and locks; remembers what was done in which order."""

    name = "fork"
    pid = 4711

    def __init__(self) -> None:
        self.done: list[str] = []
        self.channel: Any = self
        self.answer: dict[str, Any] = dict(CANARY)
        self.covered: list[bool] = []
        self.locked: list[Sequence[nvml.Gpu] | None] = []
        self.gpus = {"a": Gpu("GPU-a"), "b": Gpu("GPU-b")}

    def server(self, preload: Sequence[str]) -> "Played":
        self.done.append("imports")
        return self

    def start(self, task: str, environ: Mapping[str, str]) -> "Played":
        self.done.append("canary")
        return self

    def send(self, message: Any) -> None:
        pass

    def receive(self, timeout_s: float) -> dict[str, Any]:
        return self.answer

    def kill(self) -> None:
        pass

    def close(self) -> None:
        self.done.append("close")

    def lock(self, gpus: Sequence[nvml.Gpu] | None, say: Any) -> "Lock":
        self.done.append("lock")
        self.locked.append(gpus)
        return Lock(self)

    def gpu_by_uuid(self, uuid: str) -> nvml.Gpu:
        if uuid not in self.gpus:
            raise nvml.NvmlUnavailable(f"NVML knows no GPU with the uuid {uuid}")
        return self.gpus[uuid]


class Lock:
    def __init__(self, played: Played) -> None:
        self.played = played

    def close(self) -> None:
        self.played.done.append("unlock")

    def cover(self, uuids: Sequence[str]) -> bool:
        return self.played.covered.pop() if self.played.covered else True


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    monkeypatch.setattr(module, "ForkServer", played.server)
    monkeypatch.setattr(module, "lock_gpus", played.lock)
    monkeypatch.setattr(module, "visible_gpus", lambda count: list(played.gpus.values())[:count])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(nvml, "driver_version", lambda: "580.95.05")
    monkeypatch.setattr(nvml, "gpu_by_uuid", played.gpu_by_uuid)
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-45-generic")
    return played


def start(played: Played, said: list[str] | None = None, **options: Any) -> Machine:
    chosen = {"allow_shared": False, "name_host": False, **options}
    return start_machine("cuda", [], say=lambda _: None, tell=(said if said is not None else []).append, **chosen)


def test_the_gpus_are_locked_from_before_the_imports_until_the_machine_is_closed(played: Played) -> None:
    machine = start(played, gpus=1)
    assert played.done == ["lock", "imports", "canary"]
    assert played.locked == [[played.gpus["a"]]]
    machine.close()
    assert played.done[-2:] == ["close", "unlock"]


def test_all_gpus_are_locked_where_any_may_be_used(played: Played) -> None:
    start(played)
    assert played.locked == [list(played.gpus.values())]


def test_where_cuda_counts_otherwise_its_gpus_are_locked_and_asked_anew(played: Played) -> None:
    played.covered = [False]
    played.answer["uuids"] = ["b", "a"]
    played.answer["uuid"] = "b"
    start(played, gpus=1)
    assert played.done == ["lock", "imports", "canary", "unlock", "lock", "canary"]
    assert played.locked == [[played.gpus["a"]], [played.gpus["b"]]]
    played.gpus["b"].others = {5: MIB}
    played.covered = [False]
    with pytest.raises(UsageError):
        start(played, gpus=1)
    assert played.done[-2:] == ["close", "unlock"]


def test_other_processes_are_looked_for_with_the_lock_held_and_refused(played: Played) -> None:
    played.gpus["a"].others = {5: 1024 * MIB, 6: None}
    with pytest.raises(UsageError, match=r"pid 5, 6, 1\.0 GiB.*--vram-allow-shared"):
        start(played)
    assert played.done == ["lock", "imports", "canary", "close", "unlock"]
    assert start(played, allow_shared=True).gpu is played.gpus["a"]


def test_processes_on_a_second_gpu_are_refused_where_it_is_used(played: Played) -> None:
    played.gpus["b"].others = {5: 1024 * MIB}
    start(played, gpus=1)
    with pytest.raises(UsageError, match="pid 5"):
        start(played, gpus=2)


def test_where_nothing_can_be_locked_it_is_said_and_measured(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gpus: Any, say: Any) -> None:
        raise NotLocked("/tmp/x.lock: Permission denied")

    monkeypatch.setattr(module, "lock_gpus", refuse)
    said: list[str] = []
    machine = start(played, said)
    assert machine.locks is None
    assert said == ["the GPU is not locked, another sweep may start beside this one: /tmp/x.lock: Permission denied"]
    machine.close()


def test_no_gpu_is_locked_for_the_cpu(played: Played) -> None:
    start_machine("cpu", [], allow_shared=False, name_host=False, say=lambda _: None).close()
    assert played.done == ["imports", "close"]


def test_the_facts_of_a_gpu(played: Played) -> None:
    facts = start(played).facts
    assert (facts["gpu"], facts["driver"], facts["power_limit_w"]) == ("NVIDIA H100", "580.95.05", 700.0)
    assert (facts["unified_memory"], facts["mig"]) == (False, False)
    assert "spills" not in facts


def test_memory_that_is_shared_with_the_host_is_a_fact(played: Played) -> None:
    played.answer["integrated"] = True
    assert start(played).facts["unified_memory"] is True


@pytest.mark.parametrize("where", ["WSL", "WDDM"])
def test_windows_is_a_fact(played: Played, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "WSL":
        monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    else:
        monkeypatch.setattr(Gpu, "driver_model", lambda self: "WDDM")
    machine = start(played)
    assert machine.facts["spills"] == where
    assert machine.spills


def test_an_instance_is_under_mig_whatever_its_driver_says_of_it(played: Played) -> None:
    played.gpus["a"] = Gpu("MIG-a", part_of=Named("GPU-a"))
    assert start(played).facts["mig"] is True


def test_a_driver_that_does_not_tell_its_version_costs_no_run(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["580.95.05"])

    def version() -> str:
        for answer in answers:
            return answer
        raise nvml.NvmlUnavailable("the NVIDIA driver does not tell its version")

    monkeypatch.setattr(nvml, "driver_version", version)
    facts = start(played).facts
    assert "driver" not in facts
    assert facts["power_limit_w"] == 700.0


def test_a_gpu_that_nvml_does_not_know_is_measured_without(played: Played) -> None:
    played.gpus = {}
    machine = start(played)
    assert machine.gpus == [None, None]
    why = "NVML does not know this GPU"
    assert machine.cannot == {
        "memory.nvml_process_peak_bytes": why,
        "memory.nvml_device_peak_bytes": why,
        "energy_j_per_image": why,
        "telemetry": why,
    }


def test_the_baseline_is_the_idle_one_where_nvml_does_not_answer(played: Played) -> None:
    machine = start(played)
    assert machine.baseline() == machine.baseline(1) == 500 * MIB
    played.gpus["a"].used_bytes = lambda: None  # type: ignore[method-assign]
    assert machine.baseline() == 500 * MIB

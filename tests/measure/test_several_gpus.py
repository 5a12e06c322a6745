"""Cases that take several GPUs: one worker on all of them, or one for each."""

import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from pytest_vram.measure import measurement
from pytest_vram.measure.forkserver import ForkServer, Starter
from pytest_vram.records.schema import GpuMemory
from tests.measure.tasks import MIB
from tests.measure.test_measurement import IDLE, Card, Stage

BALANCED = ["fp32", "device_map_balanced"]
PARALLEL = ["fp32", "context_parallel_ulysses"]
FIRST = {"allocated_peak_bytes": 500 * MIB, "reserved_peak_bytes": 600 * MIB, "reserved_bytes": 600 * MIB}
SECOND = {"allocated_peak_bytes": 180 * MIB, "reserved_peak_bytes": 200 * MIB, "reserved_bytes": 200 * MIB}


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(["tests.measure.tasks"])
    yield server
    server.close()


class OneOf(Card):
    """Of the workers that have been started this GPU sees every `of`th, from `first` on."""

    def __init__(self, stage: Stage, worker_mib: int, first: int, of: int) -> None:
        super().__init__(worker_mib)
        self.stage, self.first, self.of = stage, first, of

    def _worker(self) -> tuple[int, int] | None:
        pids = self.stage.starter.pids[self.first :: self.of]
        return (pids[-1], self.worker_mib[0] * MIB) if pids and psutil.pid_exists(pids[-1]) else None


def two_gpus(server: Starter, *, processes: int) -> Stage:
    stage = Stage(server, "cuda", Card())
    stage.machine.gpu = OneOf(stage, 1000, 0, processes)
    stage.machine.others = [OneOf(stage, 500, processes - 1, processes)]
    stage.machine.others_idle = [IDLE]
    stage.machine.uuids = ["aa", "bb"]
    return stage


@pytest.fixture
def shared(server: ForkServer) -> Stage:
    return two_gpus(server, processes=1)


@pytest.fixture
def paired(server: ForkServer) -> Stage:
    return two_gpus(server, processes=2)


def test_one_worker_on_two_gpus_has_figures_for_each(shared: Stage) -> None:
    record = shared.measure(optimizations=BALANCED, done={"gpus": [FIRST, SECOND], "weights_bytes": 550 * MIB})
    assert record.status == "ok", record.failure
    assert [job["gpus"] for job in shared.jobs] == [2]
    assert record.gpus == [
        GpuMemory(
            allocated_peak_bytes=500 * MIB,
            reserved_peak_bytes=600 * MIB,
            nvml_process_peak_bytes=1000 * MIB,
            context_bytes=400 * MIB,
        ),
        GpuMemory(
            allocated_peak_bytes=180 * MIB,
            reserved_peak_bytes=200 * MIB,
            nvml_process_peak_bytes=500 * MIB,
            context_bytes=300 * MIB,
        ),
    ]
    assert record.memory.allocated_peak_bytes == 500 * MIB


def test_the_need_is_searched_on_each_gpu_while_the_other_has_room(shared: Stage) -> None:
    record = shared.search(optimizations=BALANCED, done={"gpus": [FIRST, SECOND]}, need_mib=[550, 190])
    needs = [gpu.need_bytes or 0 for gpu in record.gpus]
    assert needs == [pytest.approx(need * MIB, abs=16 * MIB) for need in (550, 190)]
    assert [gpu.required_bytes for gpu in record.gpus] == [needs[0] + 400 * MIB, needs[1] + 300 * MIB]
    assert record.memory.required_bytes == record.gpus[0].required_bytes
    probes = [channel.told for channel in shared.starter.channels if channel.told[0].get("probe")]
    assert {tuple(told[1]["gpus"]) for told in probes} == {(0,), (1,)}
    assert all(told[1]["cap_bytes"] <= 200 * MIB for told in probes if told[1]["gpus"] == [1])


def test_a_worker_for_each_gpu(paired: Stage) -> None:
    record = paired.search(optimizations=PARALLEL)
    assert record.status == "ok", record.failure
    first, second, *_ = paired.starter.environs
    assert [environ["CUDA_VISIBLE_DEVICES"] for environ in (first, second)] == ["GPU-aa", "GPU-bb"]
    assert [(e["RANK"], e["WORLD_SIZE"], e["LOCAL_RANK"]) for e in (first, second)] == [
        ("0", "2", "0"),
        ("1", "2", "0"),
    ]
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert [job["gpus"] for job in paired.jobs[:2]] == [1, 1]
    assert [gpu.context_bytes for gpu in record.gpus] == [400 * MIB, None]  # 500 held is below the 600 of the pool
    assert len({gpu.need_bytes for gpu in record.gpus}) == 1
    assert record.memory.need_bytes == pytest.approx(550 * MIB, abs=16 * MIB)
    assert record.memory.required_bytes == record.gpus[0].required_bytes


@pytest.mark.parametrize("lost", ["0", "1"])
@pytest.mark.parametrize("dies", [False, True])
def test_where_one_process_is_lost_the_other_does_not_wait(paired: Stage, lost: str, dies: bool) -> None:
    began = time.monotonic()
    record = paired.measure(optimizations=PARALLEL, lost=lost, dies=dies)
    assert time.monotonic() - began < 10
    assert record.status == ("error" if dies else "oom")
    assert record.failure is not None
    said = "the worker was killed by signal 9"
    assert (said if dies else "on the other GPU") in record.failure.message
    assert ("on another GPU" in record.failure.message) is (dies and lost == "1")


def test_where_another_process_never_finishes_the_case_fails(paired: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "FOLLOW_S", 0.2)
    record = paired.measure(optimizations=PARALLEL, slow="1")
    assert record.status == "error"
    assert record.failure is not None
    assert record.failure.message == "the process on another GPU did not finish"


def test_a_case_for_more_gpus_than_there_are_is_skipped(server: ForkServer) -> None:
    record = Stage(server, "cuda", Card()).measure(optimizations=BALANCED)
    assert (record.status, record.reason) == ("skipped", "device_map_balanced takes 2 GPUs, and torch sees 1")


def test_what_the_second_gpu_held_before_is_not_counted(shared: Stage) -> None:
    second = shared.machine.others[0]
    assert isinstance(second, Card)
    before = second.used_bytes()
    assert before == IDLE
    shared.measure(optimizations=BALANCED, done={"gpus": [FIRST, SECOND]})
    second.worker_mib = (2000,)
    record = shared.measure(optimizations=BALANCED, done={"gpus": [FIRST, SECOND]})
    assert record.memory.nvml_device_peak_bytes == 2000 * MIB


def test_the_number_of_rounds_is_agreed_with_no_pickle() -> None:
    import torch.distributed

    from pytest_vram.measure.generation import _agreed

    assert _agreed(7) == 7, "a process by itself"
    distributed: Any = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert _agreed(7) == 7
    finally:
        distributed.destroy_process_group()

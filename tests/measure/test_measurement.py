"""One case through measure(), with workers that speak the protocol and hold no pipeline, and a GPU that is played."""

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import read_model
from pytest_vram.errors import StartError
from pytest_vram.measure import nvml
from pytest_vram.measure.forkserver import ForkServer, Starter, Worker
from pytest_vram.measure.job import job_of
from pytest_vram.measure.machine import Device, Machine
from pytest_vram.measure.measurement import CaseInterrupted, Settings, measure
from pytest_vram.measure.sampling import Sampler
from pytest_vram.records.schema import Failure, Memory, PhaseCost, Record, Time
from tests.measure.tasks import MIB, ROUND

TINY = read_model(Path(__file__).parents[1] / "models" / "tiny-sd.toml")
IDLE = 500 * MIB
CARD = 16_000 * MIB


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(["tests.measure.tasks"])
    yield server
    server.close()


class Watched:
    """Starts workers by the server and remembers them."""

    name = "fork"

    def __init__(self, server: Starter) -> None:
        self._server = server
        self.pids: list[int] = []
        self.environs: list[dict[str, str]] = []

    def start(self, task: str, environ: Mapping[str, str]) -> Worker:
        worker = self._server.start(task, environ)
        self.pids.append(worker.pid)
        self.environs.append(dict(environ))
        return worker

    def wait(self, pid: int, timeout_s: float) -> int | None:
        return self._server.wait(pid, timeout_s)

    def close(self) -> None:
        return None


class Broken:
    """Starts no worker."""

    name = "fork"

    def start(self, task: str, environ: Mapping[str, str]) -> Worker:
        raise StartError("the fork server is gone")

    def wait(self, pid: int, timeout_s: float) -> int | None:
        return None

    def close(self) -> None:
        return None


class Card(nvml.Gpu):
    """What each worker holds while it lives, in MiB; the last figure goes for all that follow."""

    def __init__(self, *worker_mib: int, listed: bool = True) -> None:
        self.worker_mib = worker_mib or (1000,)
        self.listed = listed
        self.others: Callable[[int], Sequence[int]] = lambda worker: ()
        self.throttle: Callable[[int, int], Sequence[str]] = lambda worker, index: ()
        self.pids: list[int] = []
        self.rounds_over = 0

    def _worker(self) -> tuple[int, int] | None:
        """(pid, bytes) of the worker that lives."""
        if not self.pids or not psutil.pid_exists(self.pids[-1]):
            return None
        number = min(len(self.pids), len(self.worker_mib))
        return self.pids[-1], self.worker_mib[number - 1] * MIB

    def used_bytes(self) -> int | None:
        worker = self._worker()
        return IDLE + (worker[1] if worker else 0)

    def processes(self) -> dict[int, int | None]:
        worker = self._worker()
        if worker is None or not self.listed:
            return {}
        return {worker[0]: worker[1], **dict.fromkeys(self.others(len(self.pids)), 100 * MIB)}

    def state(self) -> nvml.State:
        throttle = self.throttle(len(self.pids), self.rounds_over)
        return nvml.State(1980, 60, 300.0, tuple(throttle))


class Story:
    """Remembers what it is told, and tells the card when a round is over."""

    def __init__(self, card: Card | None = None) -> None:
        self.card = card
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)
        if self.card:
            self.card.rounds_over = int(text.split()[1]) if text.startswith("round ") else 0

    @property
    def caps(self) -> list[str]:
        return [text for text in self.texts if text.startswith("cap ")]


class Stage:
    """A machine, a story, and one call to measure a case of the tiny model."""

    def __init__(self, server: Starter, device: Device, card: Card | None = None) -> None:
        self.starter = Watched(server)
        self.machine = Machine(device, self.starter, gpu=card, facts={"gpu_idle_bytes": IDLE})
        if device == "cuda":
            self.machine.memory_bytes = CARD
        if card:
            card.pids = self.starter.pids
        self.story: Story = Story(card)

    def measure(
        self,
        task: str = "generate",
        *,
        optimizations: Sequence[str] = ("fp32",),
        limit_mib: int | None = None,
        settings: Mapping[str, Any] = {},
        **script: Any,
    ) -> Record:
        case = Case(
            model="tiny-sd",
            optimizations=tuple(optimizations),
            height=32,
            width=32,
            batch_size=2,
            steps=3,
            guidance_scale=5.0,
            scheduler="PNDMScheduler",
            limit_bytes=None if limit_mib is None else limit_mib * MIB,
        )
        chosen = Settings(**{"task": f"tests.measure.tasks:{task}", "timeout_s": 20.0, **settings})
        model = TINY.model_copy(update={"pipeline_arguments": {"script": json.dumps(script)}})
        record = measure(case, job_of(case, model), self.machine, chosen, self.story.say)
        assert (record.id, record.case, record.method) == (case.id, case, "measured")
        assert not any(psutil.pid_exists(pid) for pid in self.starter.pids)
        return record


@pytest.fixture
def cpu(server: ForkServer) -> Stage:
    return Stage(server, "cpu")


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def cuda(server: ForkServer, card: Card) -> Stage:
    return Stage(server, "cuda", card)


def failure_of(record: Record) -> Failure:
    assert record.failure is not None
    return record.failure


# A case that goes well


def test_a_case_on_the_gpu(cuda: Stage) -> None:
    record = cuda.measure()
    assert (record.status, record.failure, record.disturbed) == ("ok", None, None)
    assert record.memory == Memory(
        weights_bytes=300 * MIB,
        allocated_peak_bytes=500 * MIB,
        reserved_peak_bytes=600 * MIB,
        nvml_process_peak_bytes=1000 * MIB,
        nvml_device_peak_bytes=1000 * MIB,  # less the 500 of the idle device
        context_bytes=400 * MIB,
        host_peak_bytes=1000 * MIB,
        alloc_retries=0,
    )
    assert record.phases == {
        "load": PhaseCost(time_s=0.5, allocated_peak_bytes=300 * MIB),
        "encode": PhaseCost(time_s=0.1),
        "denoise": PhaseCost(time_s=0.6, allocated_peak_bytes=500 * MIB),
        "decode": PhaseCost(time_s=0.3),
    }
    assert record.effects == {"fp32": "applied"}
    assert [r.sm_clock_mhz for r in record.telemetry.rounds] == [1980] * 3
    assert cuda.story.caps == ["cap None"]
    assert cuda.story.texts[-1] == "round 3 of 3"


def test_times_are_medians_of_the_rounds(cuda: Stage) -> None:
    rounds = [{**ROUND, "denoise": seconds} for seconds in (0.6, 0.9, 3.6)]
    time = cuda.measure(done={"rounds": rounds}).time
    assert time.workers[0].rounds_s == pytest.approx([1.0, 1.3, 4.0])
    assert time.workers[0].median_s == time.median_s == pytest.approx(1.3)
    assert time.step_s == pytest.approx(0.3)  # 0.9 s by three calls
    assert time.images_per_s == pytest.approx(2 / 1.3)
    assert time.full_length_s == pytest.approx(0.1 + 30 * 0.3 + 0.3)
    assert (time.full_length_steps, time.cold_s, time.rounds_discarded) == (3, 2.0, 0)


def test_a_case_on_the_cpu_has_times_and_no_gpu_memory(cpu: Stage) -> None:
    record = cpu.measure()
    assert record.status == "ok"
    assert record.memory == Memory(weights_bytes=300 * MIB, host_peak_bytes=1000 * MIB)
    assert record.time.median_s == pytest.approx(1.0)
    assert "CPU" in record.unavailable["memory.reserved_peak_bytes"]


def test_each_fresh_worker_has_its_rounds(cuda: Stage) -> None:
    record = cuda.measure(settings={"workers": 3})
    assert [len(worker.rounds_s) for worker in record.time.workers] == [3, 3, 3]
    assert len(set(cuda.starter.pids)) == 3
    assert record.wall is not None
    assert record.wall.load_s == pytest.approx(1.5)


def test_a_worker_gets_the_environment_of_its_optimizations(cuda: Stage) -> None:
    cuda.measure(optimizations=["fp32", "expandable_segments"])
    cuda.measure()
    with_it, without = (environ.get("PYTORCH_CUDA_ALLOC_CONF") for environ in cuda.starter.environs)
    assert (with_it, without) == ("expandable_segments:True", None)


@pytest.mark.parametrize("where", ["cpu", "gpu", "gpu without NVML", "gpu not sampled"])
def test_every_figure_that_is_missing_has_a_true_reason(server: ForkServer, where: str) -> None:
    stage = Stage(server, "cpu" if where == "cpu" else "cuda", Card() if where in ("gpu", "gpu not sampled") else None)
    if where == "gpu without NVML":
        keys = ("nvml_process_peak_bytes", "nvml_device_peak_bytes")
        stage.machine.cannot = {f"memory.{key}": "NVML does not know this GPU" for key in keys}
    record = stage.measure(settings={"interval_s": None} if where == "gpu not sampled" else {})
    assert record.status == "ok"
    missing = {f"memory.{key}" for key, value in record.memory.model_dump().items() if value is None}
    assert missing - record.unavailable.keys() <= {"memory.estimated_allocated_peak_bytes"}
    untrue = [key for key in missing if "did not get so far" in record.unavailable.get(key, "")]
    assert untrue == []  # the worker did get to the end


# A case that does not


def test_a_combination_that_cannot_be_is_skipped_with_no_worker(cpu: Stage) -> None:
    record = cpu.measure(optimizations=["fp32", "model_offload"])
    assert (record.status, record.reason) == ("skipped", "model_offload needs a GPU")
    assert cpu.starter.pids == []


def test_a_worker_that_raises(cpu: Stage) -> None:
    record = cpu.measure("blow", raises="no such layer")
    failure = failure_of(record)
    assert (record.status, failure.phase) == ("error", None)
    assert failure.message == "the worker ended with exit code 1: ValueError: no such layer"
    assert failure.output_tail.startswith("Traceback")
    assert record.memory.model_dump(exclude_none=True) == {}
    assert record.unavailable["time"] == "no round was completed: error"


def test_a_worker_that_is_killed(cpu: Stage) -> None:
    failure = failure_of(cpu.measure("die"))
    assert failure.phase == "load"
    assert "was killed by signal 9" in failure.message
    assert "out of memory" in failure.message  # of the host


def test_a_worker_that_hangs(cpu: Stage) -> None:
    record = cpu.measure("sleep", settings={"timeout_s": 0.2})
    assert record.status == "timeout"
    assert failure_of(record) == Failure(phase="load", message="no result within 0.2 s in load (--vram-timeout)")


def test_a_worker_that_cannot_be_started(cpu: Stage) -> None:
    cpu.machine.starter = Broken()
    record = cpu.measure()
    assert (record.status, failure_of(record).message) == ("error", "the fork server is gone")


@pytest.mark.parametrize(("limit_mib", "limit"), [(None, CARD), (2000, 2000 * MIB)])
def test_out_of_memory_is_a_result(cuda: Stage, limit_mib: int | None, limit: int) -> None:
    reported = {"status": "oom", "phase": "denoise", "requested_bytes": 64 * MIB, "message": "OutOfMemoryError: CUDA"}
    record = cuda.measure(limit_mib=limit_mib, failed=reported)
    assert record.status == "oom"
    assert failure_of(record) == Failure(
        phase="denoise", requested_bytes=64 * MIB, limit_bytes=limit, message="OutOfMemoryError: CUDA"
    )
    assert record.memory.allocated_peak_bytes == 500 * MIB  # what was held until then
    assert record.time == Time()


def test_an_error_that_is_reported(cuda: Stage) -> None:
    record = cuda.measure(failed={"status": "error", "phase": "decode", "message": "RuntimeError: shapes"})
    assert record.status == "error"
    assert failure_of(record) == Failure(phase="decode", message="RuntimeError: shapes")


def test_a_failure_ends_the_case_whatever_workers_are_left(cuda: Stage) -> None:
    failed = {"status": "error", "phase": "load", "message": "x"}
    assert cuda.measure(settings={"workers": 3}, failed=failed).status == "error"
    assert len(cuda.starter.pids) == 1


@pytest.mark.parametrize("moment", [(Story, "say"), (Sampler, "sample")], ids=["while it talks", "while it is silent"])
def test_ctrl_c_leaves_no_worker_and_carries_the_record(
    cpu: Stage, moment: tuple[type, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(*moment, interrupt)
    with pytest.raises(CaseInterrupted) as caught:
        cpu.measure("sleep")
    record = caught.value.record
    assert (record.status, failure_of(record).message) == ("error", "interrupted")
    assert len(cpu.starter.pids) == 1
    assert not psutil.pid_exists(cpu.starter.pids[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["blow", "generate"])
def test_folders_are_cut_from_what_a_worker_says(cpu: Stage, task: str) -> None:
    text = f"no file {Path.home()}/models/a or {tempfile.gettempdir()}/b"
    record = cpu.measure(task, failed={"status": "error", "phase": "load", "message": text}, raises=text)
    assert failure_of(record).message.endswith("no file ~/models/a or <tmp>/b")
    assert f"{Path.home()}/" not in record.model_dump_json()
    assert f"{tempfile.gettempdir()}/" not in record.model_dump_json()


# Figures that cannot be


@pytest.mark.parametrize(
    ("done", "problem"),
    [
        ({"allocated_peak_bytes": 601 * MIB}, "allocated_peak_bytes .* is above reserved_peak_bytes"),
        ({"weights_bytes": 501 * MIB}, "weights_bytes .* is above allocated_peak_bytes"),
        ({"reserved_peak_bytes": CARD + 1}, "reserved_peak_bytes .* is more than the GPU has"),
        ({"weights_bytes": -1}, "weights_bytes"),
        ({"weights_bytes": 0}, "weights_bytes"),
        ({"alloc_retries": -1}, "alloc_retries"),
        ({"phase_peaks": {"denoise": -5}}, "allocated_peak_bytes"),
        ({"rounds": []}, "no rounds"),
        ({"rounds": [{**ROUND, "denoise": -2.0}]}, "rounds_s|time_s"),
        ({"rounds": [dict.fromkeys(ROUND, 0.0)]}, "rounds_s"),
        ({"rounds": [{**ROUND, "denoise": math.nan}]}, "rounds_s|time_s"),
        ({"cold_s": 0.0}, "cold_s"),
        ({"load_s": -1.0}, "load_s|time_s"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_impossible_figures_are_an_error_and_are_not_shown(cuda: Stage, done: dict[str, Any], problem: str) -> None:
    record = cuda.measure(done=done)
    assert record.status == "error"
    assert failure_of(record).message.startswith("impossible figures: ")
    assert re.search(problem, failure_of(record).message)
    assert (record.memory, record.time, record.phases) == (Memory(), Time(), {})
    assert record.unavailable["memory"] == "impossible figures"


# --vram-limit


def test_the_cap_is_the_limit_less_the_context(cuda: Stage) -> None:
    cuda.machine.context_bytes = 400 * MIB
    record = cuda.measure(limit_mib=1000)
    assert cuda.story.caps == [f"cap {600 * MIB}"]
    assert (record.status, record.case.limit_bytes) == ("ok", 1000 * MIB)


def test_a_limit_below_the_context_still_caps(cuda: Stage) -> None:
    cuda.machine.context_bytes = 400 * MIB
    reported = {"status": "oom", "phase": "load", "message": "OutOfMemoryError"}
    assert cuda.measure(limit_mib=300, failed=reported).status == "oom"
    assert cuda.story.caps == [f"cap {MIB}"]


def test_one_more_worker_when_the_context_grew(server: ForkServer) -> None:
    stage = Stage(server, "cuda", Card(1100, 1000))  # 500 of context beside 600, then beside what the cap leaves
    stage.machine.context_bytes = 300 * MIB
    record = stage.measure(limit_mib=1000, done={"allocated_peak_bytes": 450 * MIB})
    assert stage.story.caps == [f"cap {700 * MIB}", f"cap {500 * MIB}"]
    assert stage.machine.context_bytes == 500 * MIB  # the next case begins with it
    assert record.status == "ok"
    assert (record.memory.reserved_peak_bytes, record.memory.context_bytes) == (500 * MIB, 500 * MIB)
    assert record.memory.nvml_process_peak_bytes == 1000 * MIB


# What NVML says


def test_a_pid_that_nvml_does_not_know_falls_back_to_the_device_and_says_so(server: ForkServer) -> None:
    record = Stage(server, "cuda", Card(1000, listed=False)).measure()
    assert record.status == "ok"
    assert (record.memory.nvml_process_peak_bytes, record.memory.nvml_device_peak_bytes) == (None, 1000 * MIB)
    assert record.memory.context_bytes == 400 * MIB
    assert "NVML lists no process" in record.unavailable["memory.nvml_process_peak_bytes"]
    assert "memory.nvml_device_peak_bytes" not in record.unavailable


@pytest.mark.parametrize(("process_mib", "kept"), [(535, False), (536, True)])
def test_a_peak_that_nvml_missed_is_null_with_the_reason(server: ForkServer, process_mib: int, kept: bool) -> None:
    record = Stage(server, "cuda", Card(process_mib)).measure()  # 64 MiB of slack below 600
    assert record.status == "ok"
    assert (record.memory.nvml_process_peak_bytes is not None) is kept
    assert ("between two samples" in record.unavailable.get("memory.nvml_process_peak_bytes", "")) is not kept


def test_another_process_disturbs(cuda: Stage, card: Card) -> None:
    card.others = lambda worker: [os.getpid()]
    record = cuda.measure()
    assert record.status == "ok"
    assert str(os.getpid()) in (record.disturbed or "")


@pytest.mark.parametrize("worker", [1, 2])
def test_another_process_disturbs_whichever_worker_it_met(cuda: Stage, card: Card, worker: int) -> None:
    card.others = lambda number: [12345] if number == worker else []
    assert "12345" in (cuda.measure(settings={"workers": 2}).disturbed or "")


def test_throttled_rounds_are_discarded_and_counted(cuda: Stage, card: Card) -> None:
    card.throttle = lambda worker, index: ["hw_thermal_slowdown"] if index == 1 else ["sw_power_cap"]
    rounds = [{**ROUND, "denoise": seconds} for seconds in (0.6, 99.0, 0.8)]
    record = cuda.measure(done={"rounds": rounds})
    assert record.time.rounds_discarded == 1
    assert record.time.workers[0].rounds_s == pytest.approx([1.0, 1.2])
    assert record.time.step_s == pytest.approx(0.7 / 3)
    assert [r.throttle for r in record.telemetry.rounds] == [
        ["sw_power_cap"],
        ["hw_thermal_slowdown"],
        ["sw_power_cap"],
    ]
    assert record.disturbed is None


def test_rounds_that_are_all_throttled_are_kept_and_called_disturbed(cuda: Stage, card: Card) -> None:
    card.throttle = lambda worker, index: ["hw_slowdown"]
    record = cuda.measure()
    assert (record.status, record.disturbed) == ("ok", "every round of a worker ran on a throttled GPU")
    assert len(record.time.workers[0].rounds_s) == 3


@pytest.mark.parametrize(("throttled", "disturbed"), [([], False), ([1], True), ([2], True), ([1, 2], True)])
def test_a_worker_that_was_throttled_throughout_is_said_and_its_rounds_are_not_discarded(
    cuda: Stage, card: Card, throttled: list[int], disturbed: bool
) -> None:
    card.throttle = lambda worker, index: ["hw_slowdown"] if worker in throttled else []
    record = cuda.measure(settings={"workers": 2})
    assert (record.disturbed == "every round of a worker ran on a throttled GPU") is disturbed

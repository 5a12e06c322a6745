"""One case through measure(), with workers that speak the protocol and hold no pipeline, and a GPU that is played."""

import errno
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

from pytest_vram.cases.case import AnyCase, Case, OwnCase
from pytest_vram.cases.models import read_model
from pytest_vram.errors import StartError
from pytest_vram.measure import conversation, measurement, nvml
from pytest_vram.measure.channel import Channel, Message
from pytest_vram.measure.exactness import References
from pytest_vram.measure.forkserver import ForkServer, Starter, Worker
from pytest_vram.measure.job import job_of
from pytest_vram.measure.machine import Device, Machine
from pytest_vram.measure.measurement import CaseInterrupted, Estimated, Settings, measure
from pytest_vram.measure.recording import NEED_FIELDS, ONE_STEP
from pytest_vram.measure.sampling import Sampler
from pytest_vram.pipelines.optimizations.base import OFFLOAD_FOLDER
from pytest_vram.records.schema import SEARCH_INTERRUPTED, Exactness, Failure, Memory, PhaseCost, Record, Time
from tests.measure.tasks import DIFFERENCE, MIB, ROUND

TINY = read_model(Path(__file__).parents[1] / "models" / "tiny-sd.toml")
KILLED = "was killed by signal 9 (the kernel does so when the host runs out of memory)"
IDLE = 500 * MIB
CARD = 16_000 * MIB


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(["tests.measure.tasks"])
    yield server
    server.close()


class Overheard(Channel):
    """A channel that remembers what the worker was told; if `interrupted`, Ctrl-C comes while it is listened to."""

    def __init__(self, channel: Channel, interrupted: bool) -> None:
        super().__init__(channel._socket)
        self.interrupted = interrupted
        self.told: list[Message] = []

    def send(self, message: Message) -> None:
        self.told.append(message)
        super().send(message)

    def receive(self, timeout_s: float | None = None) -> Message | None:
        if self.interrupted:
            raise KeyboardInterrupt
        return super().receive(timeout_s)


class Watched:
    """Starts workers by the server and remembers them."""

    name = "fork"

    def __init__(self, server: Starter) -> None:
        self._server = server
        self.pids: list[int] = []
        self.environs: list[dict[str, str]] = []
        self.channels: list[Overheard] = []
        self.interrupted: int | None = None  # which worker, from 1, is at work when Ctrl-C comes

    def start(self, task: str, environ: Mapping[str, str]) -> Worker:
        worker = self._server.start(task, environ)
        self.pids.append(worker.pid)
        self.environs.append(dict(environ))
        self.channels.append(Overheard(worker.channel, self.interrupted == len(self.pids)))
        worker.channel = self.channels[-1]
        return worker

    @property
    def losses(self) -> Sequence[str]:
        return self._server.losses

    def wait(self, pid: int, timeout_s: float) -> int | None:
        return self._server.wait(pid, timeout_s)

    def close(self) -> None:
        return None


class Broken:
    """Starts no worker."""

    name = "fork"
    losses: Sequence[str] = ()

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
        self.energy: Callable[[], int | None] = lambda: None  # millijoules

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

    def energy_mj(self) -> int | None:
        return self.energy()


class Story:
    """Remembers what it is told, and tells the card when a round is over."""

    def __init__(self, card: Card | None = None) -> None:
        self.card = card
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)
        if self.card and text.startswith("round "):
            self.card.rounds_over = int(text.split()[1])
        elif self.card and " rounds of about " in text:
            self.card.rounds_over = 0

    @property
    def caps(self) -> list[str]:
        return [text for text in self.texts if text.startswith("cap ")]


class Stage:
    """A machine, a story, and one call to measure a case of the tiny model, with no search unless it is asked for."""

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
        case: AnyCase | None = None,
        optimizations: Sequence[str] = ("fp32",),
        limit_mib: int | None = None,
        settings: Mapping[str, Any] = {},
        estimated: Estimated | None = None,
        references: References | None = None,
        environ: Mapping[str, str] = {},
        **script: Any,
    ) -> Record:
        case = case or case_of(*optimizations, limit_mib=limit_mib)
        chosen = Settings(**{"task": f"tests.measure.tasks:{task}", "timeout_s": 20.0, "need": False, **settings})
        model = TINY.model_copy(update={"pipeline_arguments": {"script": json.dumps(script)}})
        job = job_of(case, model) if isinstance(case, Case) else {"id": case.id, "own": {}}
        job |= {"environ": dict(environ)} if environ else {}
        job["model"] = model.model_dump(mode="json", by_alias=True)  # where the script is
        record = measure(case, job, self.machine, chosen, self.story.say, estimated, references)
        assert (record.id, record.case, record.method) == (case.id, case, "measured")
        assert not self.leftovers
        return record

    def search(self, *, settings: Mapping[str, Any] = {}, **arguments: Any) -> Record:
        """Measure with the search for the need."""
        return self.measure(settings={**settings, "need": True}, **arguments)

    @property
    def leftovers(self) -> list[int]:
        return [pid for pid in self.starter.pids if is_alive(pid)]

    @property
    def jobs(self) -> list[Message]:
        return [channel.told[0] for channel in self.starter.channels]

    @property
    def probed(self) -> list[int]:
        """The caps of the probes, in bytes."""
        return [channel.told[1]["cap_bytes"] for channel in self.starter.channels if channel.told[0].get("probe")]


def is_alive(pid: int) -> bool:
    """Whether this process runs; one whose parent is gone may wait to be collected."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def case_of(*optimizations: str, limit_mib: int | None = None, **changes: Any) -> Case:
    """A case of the tiny model."""
    facts = {
        "model": "tiny-sd",
        "optimizations": optimizations,
        "height": 32,
        "width": 32,
        "batch_size": 2,
        "steps": 3,
        "guidance_scale": 5.0,
        "scheduler": "PNDMScheduler",
        "limit_bytes": None if limit_mib is None else limit_mib * MIB,
    }
    return Case(**{**facts, **changes})


@pytest.fixture
def cpu(server: ForkServer) -> Stage:
    return Stage(server, "cpu")


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def cuda(server: ForkServer, card: Card) -> Stage:
    return Stage(server, "cuda", card)


UNEXPLAINED = ("estimated_allocated_peak_bytes", "at_need_alloc_retries")


def found_of(record: Record) -> set[str]:
    return {key for key, value in record.memory.model_dump().items() if value is not None}


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
    steps = [{"first": first, "later": later} for first, later in ((0.4, 0.1), (0.5, 0.2), (0.6, 1.5))]
    time = cuda.measure(done={"rounds": rounds, "steps": steps}).time
    assert time.workers[0].rounds_s == pytest.approx([1.0, 1.3, 4.0])
    assert time.workers[0].median_s == time.median_s == pytest.approx(1.3)
    assert (time.first_step_s, time.step_s) == pytest.approx((0.5, 0.2))
    assert time.images_per_s == pytest.approx(2 / 1.3)
    assert time.full_length_s == pytest.approx(1.3 + 27 * 0.2)  # 30 calls of the denoiser for three
    assert (time.full_length_steps, time.cold_s, time.rounds_discarded) == (25, 2.0, 0)


def test_where_the_denoiser_ran_once_a_step_is_all_of_denoising(cuda: Stage) -> None:
    done = {"steps": [{"first": 0.5}] * 3, "denoiser_calls": 1, "native_denoiser_calls": 4}
    time = cuda.measure(done=done).time
    assert (time.first_step_s, time.step_s, time.full_length_s) == pytest.approx((0.5, 0.6, 0.1 + 4 * 0.6 + 0.3))


def test_where_an_offloaded_denoiser_ran_once_its_step_is_not_known(cuda: Stage) -> None:
    done = {"steps": [{"first": 0.5}] * 3, "denoiser_calls": 1, "native_denoiser_calls": 4}
    offloaded = case_of("fp32", "model_offload")
    record = cuda.measure(done=done, case=offloaded)
    assert (record.time.first_step_s, record.time.step_s, record.time.full_length_s) == (0.5, None, None)
    reasons = {record.unavailable[f"time.{name}"] for name in ("step_s", "full_length_s")}
    assert reasons == {ONE_STEP}
    once = cuda.measure(done={**done, "native_denoiser_calls": 1}, case=offloaded)
    assert once.time.full_length_s == once.time.median_s == pytest.approx(1.0)
    probed = {"second_call_steps": {"first": 0.5}}
    searched = cuda.search(done={**done, "denoiser_calls": 3}, fits=probed, case=offloaded)
    assert (searched.time.at_need_s, searched.unavailable["time.at_need_s"]) == (None, *reasons)
    assert searched.memory.need_bytes


def test_a_call_of_fewer_steps_takes_one_step_at_least(cuda: Stage) -> None:
    steps = [{"first": 0.1, "later": 0.4}] * 3
    time = cuda.measure(done={"steps": steps, "native_denoiser_calls": 1}).time
    assert time.full_length_s == pytest.approx(0.1 + 0.4 + 0.3)


def test_compilation_is_a_phase_and_within_the_rounds_a_disturbance(cuda: Stage) -> None:
    assert "compile" not in cuda.measure(done={"compile_s": 0.0, "compiled_again_s": 0.0}).phases
    peaks = {"load": 300 * MIB, "compile": 600 * MIB, "denoise": 500 * MIB}
    record = cuda.measure(done={"compile_s": 40.0, "compiled_again_s": 2.5, "phase_peaks": peaks})
    assert record.phases["compile"] == PhaseCost(time_s=40.0, allocated_peak_bytes=600 * MIB)
    assert record.phases["denoise"].allocated_peak_bytes == 500 * MIB
    assert record.disturbed == "torch.compile compiled again within the rounds, for 2.5 s"


def test_what_a_worker_does_not_know_of_its_calls_is_left_out(cuda: Stage) -> None:
    record = cuda.measure(done={"images": None, "native_denoiser_calls": None, "native_steps": None})
    assert record.time.median_s == pytest.approx(1.0)
    assert (record.time.images_per_s, record.time.full_length_s, record.time.full_length_steps) == (None, None, None)
    assert "scheduler does not say" in record.unavailable["time.full_length_s"]


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


def test_files_of_weights_have_a_folder_that_goes_with_their_worker(cuda: Stage) -> None:
    cuda.measure(optimizations=("fp32", "group_offload_leaf_disk"))
    folders = [Path(environ[OFFLOAD_FOLDER]) for environ in cuda.starter.environs]
    assert len(set(folders)) == len(folders) >= 1
    assert not any(folder.exists() for folder in folders)
    cuda.measure()
    assert OFFLOAD_FOLDER not in cuda.starter.environs[-1]


def test_workers_of_a_case_share_a_cache_of_compiled_code_that_goes_with_it(cuda: Stage) -> None:
    folders = []
    for _ in range(2):
        before = len(cuda.starter.environs)
        cuda.measure(settings={"workers": 2})
        environs = cuda.starter.environs[before:]
        [folder] = {Path(environ["TORCHINDUCTOR_CACHE_DIR"]) for environ in environs}
        assert {Path(environ["TRITON_CACHE_DIR"]).parent for environ in environs} == {folder}
        assert not folder.exists()
        folders.append(folder)
    assert folders[0] != folders[1]


@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("where", ["cpu", "gpu", "gpu without NVML", "gpu not sampled"])
def test_every_figure_that_is_missing_has_a_true_reason(server: ForkServer, where: str, need: bool) -> None:
    stage = Stage(server, "cpu" if where == "cpu" else "cuda", Card() if where in ("gpu", "gpu not sampled") else None)
    if where == "gpu without NVML":
        keys = ("nvml_process_peak_bytes", "nvml_device_peak_bytes")
        stage.machine.cannot = {f"memory.{key}": "NVML does not know this GPU" for key in keys}
    settings = {"interval_s": None} if where == "gpu not sampled" else {}
    record = stage.measure(settings={**settings, "need": need})
    assert record.status == "ok"
    missing = {f"memory.{key}" for key, value in record.memory.model_dump().items() if value is None}
    searched = need and where != "cpu"
    unexplained = {"estimated_allocated_peak_bytes"} if searched else UNEXPLAINED
    assert missing - record.unavailable.keys() <= {f"memory.{key}" for key in unexplained}
    assert ("memory.need_bytes" in missing) is not searched
    assert not any(record.unavailable.keys() & {f"memory.{key}" for key in found_of(record)})
    untrue = [key for key in missing if "did not get so far" in record.unavailable.get(key, "")]
    assert untrue == []  # the worker did get to the end


# The need


def test_the_need_of_a_case(cuda: Stage) -> None:
    record = cuda.search(need_mib=555)
    memory, wall = record.memory, record.wall
    assert record.status == "ok"
    assert memory.need_bytes is not None
    assert memory.need_tolerance_bytes == 16 * MIB
    assert 555 * MIB <= memory.need_bytes < (555 + 16) * MIB
    assert memory.required_bytes == memory.need_bytes + 400 * MIB  # and its context
    assert memory.at_need_alloc_retries == 4  # of the second call under the cap
    assert memory.alloc_retries == 0  # with room
    assert record.need_phase == "denoise"
    assert not record.unavailable.keys() & {*NEED_FIELDS, "need_phase"}
    assert wall is not None
    assert wall.probes == len(cuda.starter.pids) - 1 == len(cuda.probed) > 1
    assert 0 < wall.need_s < wall.total_s


def test_the_search_leaves_what_was_measured_as_it_is(cuda: Stage) -> None:
    plain = cuda.measure()
    record = cuda.search()
    searched = {"need_bytes", "need_tolerance_bytes", "required_bytes", "at_need_alloc_retries"}
    assert record.memory.model_dump(exclude=searched) == plain.memory.model_dump(exclude=searched)
    assert record.time.model_dump(exclude={"at_need_s"}) == plain.time.model_dump(exclude={"at_need_s"})
    same = {"phases", "effects", "telemetry", "disturbed", "failure"}
    assert record.model_dump(include=same) == plain.model_dump(include=same)
    assert record.unavailable == {k: v for k, v in plain.unavailable.items() if k not in NEED_FIELDS}


def test_the_need_is_what_the_last_probe_that_fitted_has_taken(cuda: Stage) -> None:
    record = cuda.search(need_mib=480, fits={"reserved_peak_bytes": 484 * MIB})
    assert record.memory.need_bytes == 484 * MIB
    assert cuda.probed[0] > 490 * MIB  # near the allocated peak, and more than it took


def test_with_expandable_segments_the_need_may_be_above_what_is_reserved(cuda: Stage) -> None:
    own = {"case": OwnCase(model="test_mine.py", test="test_it", build="a", call="b")}
    asked = {"environ": {"PYTORCH_ALLOC_CONF": "backend:native,expandable_segments:True"}}
    hows: list[dict[str, Any]] = [{"optimizations": ["fp32", "expandable_segments"]}, {**own, **asked}]
    for how in hows:
        record = cuda.search(**how, need_mib=630, fits={"reserved_peak_bytes": 600 * MIB})
        assert record.memory.reserved_peak_bytes == 600 * MIB
        assert 630 * MIB <= (record.memory.need_bytes or 0) <= 642 * MIB
    assert_no_need(cuda.search(need_mib=630, fits={"reserved_peak_bytes": 600 * MIB}), "its own reserved peak")


def test_the_call_at_need_is_as_long_as_the_measured_one(cuda: Stage) -> None:
    record = cuda.search(done={"denoiser_calls": 5})
    assert record.time.at_need_s == pytest.approx(1.4 + 3 * 0.25)  # a probe calls the denoiser twice


def test_the_call_at_need_of_a_pipeline_with_no_phases(cuda: Stage) -> None:
    whole = {"second_call": {"call": 0.7}, "second_call_steps": {}, "denoiser_calls": 0}
    assert cuda.search(done={"denoiser_calls": 0, "steps": [{}] * 3}, fits=whole).time.at_need_s == pytest.approx(0.7)


def test_a_test_of_ones_own_has_a_need_and_nothing_to_compare_with(cuda: Stage, references: References) -> None:
    record = cuda.search(case=OwnCase(model="test_mine.py", test="test_it", build="a", call="b"), references=references)
    assert 550 * MIB <= (record.memory.need_bytes or 0) < 566 * MIB
    assert (record.exactness, record.unavailable.get("exactness")) == (None, None)
    assert all("own" in job and "keep_output" not in job and "compare_output" not in job for job in cuda.jobs)


def test_the_need_is_searched_under_a_limit_too(server: ForkServer) -> None:
    stage = Stage(server, "cuda", Card(980))
    stage.machine.context_bytes = 400 * MIB
    record = stage.search(limit_mib=980, need_mib=540)
    assert stage.story.caps == [f"cap {580 * MIB}"]
    assert 540 * MIB <= (record.memory.need_bytes or 0) < 556 * MIB
    assert max(stage.probed) < 580 * MIB


@pytest.mark.parametrize(
    ("estimated_mib", "guess_mib"),
    [(None, 500), ((540, 480), 562.5), ((500, 500), 500), ((250, 500), 250)],
    ids=["at the allocated peak", "at the estimate, corrected", "at the estimate", "at a small estimate"],
)
def test_where_the_search_starts(cuda: Stage, estimated_mib: tuple[int, int] | None, guess_mib: float) -> None:
    estimated = estimated_mib and Estimated(estimated_mib[0] * MIB, estimated_mib[1] * MIB)
    cuda.search(estimated=estimated)
    assert cuda.probed[0] / MIB == pytest.approx(guess_mib, rel=0.01)


def test_a_good_estimate_saves_probes(server: ForkServer) -> None:
    def probes(estimated: Estimated | None) -> int:
        stage = Stage(server, "cuda")
        big = {"allocated_peak_bytes": 5000 * MIB, "reserved_peak_bytes": 9000 * MIB}
        stage.search(done=big, need_mib=6400, fits={"reserved_peak_bytes": None}, estimated=estimated)
        return len(stage.probed)

    assert probes(Estimated(6430 * MIB, 5000 * MIB)) <= 4 < probes(None)


def test_every_probe_is_a_fresh_worker_with_the_environment_of_the_case(cuda: Stage) -> None:
    cuda.search(optimizations=["fp32", "expandable_segments"])
    assert len(cuda.probed) > 1
    assert len(set(cuda.starter.pids)) == len(cuda.starter.pids) == 1 + len(cuda.probed)
    assert {environ["PYTORCH_CUDA_ALLOC_CONF"] for environ in cuda.starter.environs} == {"expandable_segments:True"}
    measured, *probes = cuda.jobs
    assert all(probe == {**measured, "probe": True} for probe in probes)


def test_only_the_rounds_are_sampled_and_told(cuda: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    workers: set[int] = set()
    monkeypatch.setattr(Sampler, "sample", lambda sampler, states=False: workers.add(sampler.pid))
    cuda.search()
    assert workers == {cuda.starter.pids[0]}
    told = cuda.story.texts[cuda.story.texts.index("round 3 of 3") + 1 :]
    assert [int(re.sub(r"\D", "", text)) for text in told] == [cap >> 20 for cap in cuda.probed]


def assert_no_need(record: Record, reason: str, status: str = "ok") -> None:
    assert record.status == status
    assert (record.memory.need_bytes, record.memory.need_tolerance_bytes, record.memory.required_bytes) == (None,) * 3
    assert (record.time.at_need_s, record.memory.at_need_alloc_retries, record.need_phase) == (None, None, None)
    for name in NEED_FIELDS:
        assert re.search(reason, record.unavailable[name])


def test_no_need_on_the_cpu(cpu: Stage) -> None:
    assert_no_need(cpu.search(), "no GPU memory")
    assert len(cpu.starter.pids) == 1


def test_no_need_where_none_is_wanted(cuda: Stage) -> None:
    assert_no_need(cuda.measure(), "--vram-no-need")
    assert len(cuda.starter.pids) == 1


@pytest.mark.parametrize("status", ["oom", "error"])
def test_no_need_of_a_case_that_failed(cuda: Stage, status: str) -> None:
    record = cuda.search(failed={"status": status, "phase": "load", "message": "x"})
    assert_no_need(record, "the case did not complete", status)
    assert len(cuda.starter.pids) == 1


def test_no_need_of_figures_that_cannot_be(cuda: Stage) -> None:
    assert_no_need(cuda.search(done={"cold_s": 0.0}), "the case did not complete", "error")
    assert len(cuda.starter.pids) == 1


OTHER = {"status": "error", "message": "RuntimeError: shapes"}
SWALLOWED = {"status": "oom", "swallowed": True, "message": "RuntimeError: shapes", "phase": "decode"}


@pytest.mark.parametrize(
    ("below", "reason"),
    [(OTHER, "not for memory: RuntimeError: shapes"), ("die", "not for memory: the worker was killed by signal 9")],
    ids=["an error", "killed"],
)
def test_a_probe_that_fails_for_another_reason_ends_the_search(cuda: Stage, below: Any, reason: str) -> None:
    record = cuda.search(below=below)
    assert_no_need(record, reason)
    assert record.time.median_s == pytest.approx(1.0)
    assert record.failure is None
    assert len(cuda.probed) == 1


def test_a_probe_that_hangs_ends_the_search(cuda: Stage) -> None:
    assert_no_need(cuda.search(below="hang", settings={"timeout_s": 1.0}), "no result within 1 s")
    assert len(cuda.probed) == 1


def test_a_probe_has_no_longer_than_the_case_lets_expect(cuda: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "later_timeout_s", lambda timeout_s, first_s: 1.0 if first_s < timeout_s else 9.0)
    record = cuda.search(below="hang")
    assert_no_need(record, "no result within 1 s")
    assert record.time.median_s == pytest.approx(1.0)


def test_rounds_that_hang_are_not_waited_for_as_long_as_a_cold_call(
    cpu: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "LEAST_S", 0.0)
    monkeypatch.setattr(conversation, "LATER_FACTOR", 0.1)
    record = cpu.measure(hangs=True)  # in three rounds of a second each, as it says
    assert record.status == "timeout"
    assert re.fullmatch(r"no result within 0\.\d+ s \(--vram-timeout\)", failure_of(record).message)
    assert record.memory.weights_bytes == 300 * MIB  # what was found before is kept


def test_folders_are_cut_from_why_there_is_no_need(cuda: Stage) -> None:
    text = f"no file {Path.home()}/models/a"
    assert_no_need(cuda.search(below={**OTHER, "message": text}), "no file ~/models/a")


def test_an_out_of_memory_that_the_pipeline_swallows_is_one_if_it_completes_with_room(cuda: Stage) -> None:
    record = cuda.search(need_mib=555, below=SWALLOWED)
    assert 555 * MIB <= (record.memory.need_bytes or 0) < (555 + 16) * MIB
    assert record.need_phase == "decode"
    assert cuda.probed.count(600 * MIB) == 1  # with room it was tried once


def test_an_out_of_memory_that_is_swallowed_is_none_if_it_fails_with_room_too(cuda: Stage) -> None:
    assert_no_need(cuda.search(need_mib=5000, below=SWALLOWED), "not for memory: RuntimeError: shapes")
    assert cuda.probed[1:] == [600 * MIB]


def test_no_need_where_not_even_its_own_reserved_peak_suffices(cuda: Stage) -> None:
    assert_no_need(cuda.search(need_mib=5000), "its own reserved peak")
    assert cuda.probed[-2:] == [600 * MIB, 616 * MIB]


def test_no_required_memory_where_the_context_is_not_known(server: ForkServer) -> None:
    record = Stage(server, "cuda").search()
    assert (record.memory.context_bytes, record.memory.required_bytes) == (None, None)
    assert record.memory.need_bytes is not None
    assert record.unavailable["memory.required_bytes"] == "the context is not known"
    assert not record.unavailable.keys() & (set(NEED_FIELDS) - {"memory.required_bytes"})


@pytest.mark.parametrize("call", [{"encode": 0.0}, {"denoise": math.nan}, {"decode": -9.0}])
def test_a_need_with_impossible_figures_is_not_shown(cuda: Stage, call: dict[str, float]) -> None:
    record = cuda.search(fits={"second_call": call, "second_call_steps": {}})
    assert_no_need(record, "^impossible figures: ")
    assert record.time.median_s == pytest.approx(1.0)


# Where it is interrupted


@pytest.mark.parametrize("moment", ["between two workers", "while a probe runs"])
def test_ctrl_c_in_the_search_keeps_what_was_measured(
    cuda: Stage, moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def say(text: str) -> None:
        if len(cuda.probed) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if moment == "between two workers":
        monkeypatch.setattr(cuda.story, "say", say)
    else:
        cuda.starter.interrupted = 3
    with pytest.raises(CaseInterrupted) as caught:
        cuda.search()
    record = caught.value.record
    assert_no_need(record, rf"^{SEARCH_INTERRUPTED}; it ran out of memory under \d+ MiB$")
    assert (record.failure, record.memory.context_bytes) == (None, 400 * MIB)
    assert record.time.median_s == pytest.approx(1.0)
    assert len(cuda.starter.pids) == (2 if moment == "between two workers" else 3)
    assert cuda.leftovers == []
    assert list(tmp_path.iterdir()) == []


def test_what_a_search_had_found_is_said_when_it_is_interrupted(cuda: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for probes in range(6):

        def say(text: str, probes: int = probes, before: int = len(cuda.probed)) -> None:
            if text.startswith("need:") and len(cuda.probed) - before == probes:
                raise KeyboardInterrupt

        before = len(cuda.probed)
        monkeypatch.setattr(cuda.story, "say", say)
        with pytest.raises(CaseInterrupted) as caught:
            cuda.search()
        caps = cuda.probed[before:]
        assert len(caps) == probes
        reason = caught.value.record.unavailable["memory.need_bytes"].removeprefix(SEARCH_INTERRUPTED)
        completed = [cap >> 20 for cap in caps if cap >= 550 * MIB]
        ran_out = [cap >> 20 for cap in caps if cap < 550 * MIB]
        assert reason == (f"; the case completed under a cap of {min(completed)} MiB" if completed else "") + (
            f"; it ran out of memory under {max(ran_out)} MiB" if ran_out else ""
        )


# The output, compared with that of the case with its dtype alone

TILED = case_of("fp32", "vae_tiling")


@pytest.fixture
def references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[References]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cases = [case_of("fp32"), TILED, case_of("fp32", "vae_slicing"), case_of("fp32", "model_offload")]
    references = References(cases)
    yield references
    references.close()


def test_a_case_keeps_its_output_for_those_that_are_compared_with_it(cuda: Stage, references: References) -> None:
    plain = cuda.measure(references=references)
    assert (plain.exactness, plain.exact, plain.unavailable.get("exactness")) == (None, None, None)
    tiled = cuda.measure(case=TILED, references=references)
    assert tiled.exactness == Exactness(against=plain.id, **DIFFERENCE)
    assert tiled.exact is True
    kept, compared = cuda.jobs  # no third worker: the output was there
    assert kept["keep_output"] == compared["compare_output"]
    assert Path(compared["compare_output"]).read_text() == "fp32"
    assert "compare_output" not in kept
    assert "keep_output" not in compared


def test_without_the_difference_nothing_is_run_for_it(cuda: Stage, references: References) -> None:
    plain, tiled = (
        cuda.measure(case=case, references=references, settings={"difference": False})
        for case in (case_of("fp32"), TILED)
    )
    assert (plain.status, plain.exactness, plain.unavailable.get("exactness")) == ("ok", None, None)
    assert (tiled.status, tiled.exactness) == ("ok", None)
    assert tiled.unavailable["exactness"] == "not compared (--vram-no-difference)"
    assert len(cuda.jobs) == 2
    assert not any("keep_output" in job or "compare_output" in job for job in cuda.jobs)


def test_a_flag_that_claims_nothing_is_compared_all_the_same(cuda: Stage, references: References) -> None:
    cuda.measure(references=references)
    record = cuda.measure(case=case_of("fp32", "layerwise_casting"), references=references)
    assert record.exactness == Exactness(against=case_of("fp32").id, claimed=False, **DIFFERENCE)
    assert record.exact is None


def test_a_worker_that_finds_a_flag_inapplicable_skips_the_case(cuda: Stage) -> None:
    record = cuda.measure(skipped="AutoencoderTiny has no enable_tiling")
    assert (record.status, record.reason) == ("skipped", "AutoencoderTiny has no enable_tiling")
    assert record.unavailable == {"memory": "skipped", "time": "skipped"}


def test_an_output_that_is_missing_is_made_by_one_more_worker_and_used_again(
    cuda: Stage, references: References
) -> None:
    compared = [
        cuda.measure(case=case, references=references) for case in (TILED, TILED, case_of("fp32", "vae_slicing"))
    ]
    assert [record.exactness for record in compared] == [Exactness(against=case_of("fp32").id, **DIFFERENCE)] * 3
    reference, *others = cuda.jobs
    assert len(others) == 3
    assert (reference["reference"], reference["on_host"]) == (True, False)
    assert Case.model_validate(reference["case"]) == case_of("fp32")
    assert {other["compare_output"] for other in others} == {reference["keep_output"]}
    assert not any("reference" in other for other in others)
    assert cuda.story.texts[0] == f"the output of {case_of('fp32').id}, to compare with"
    assert len(compared[0].time.workers) == 1
    assert len(compared[0].telemetry.rounds) == 3


def test_a_reference_has_the_environment_of_its_own_flags_and_no_limit(cuda: Stage, references: References) -> None:
    case = case_of("fp32", "expandable_segments", limit_mib=2000)
    record = cuda.measure(case=case, references=references)
    assert [environ.get("PYTORCH_CUDA_ALLOC_CONF") for environ in cuda.starter.environs] == [
        None,
        "expandable_segments:True",
    ]
    (_, reference_cap), (_, cap, *_) = (channel.told for channel in cuda.starter.channels)
    assert (reference_cap["cap_bytes"], cap["cap_bytes"]) == (None, 2000 * MIB - cuda.machine.context_bytes)
    assert record.exactness is not None
    assert record.exactness.against == case_of("fp32").id


def test_an_offloaded_case_is_compared_with_weights_that_are_made_on_the_host(
    cuda: Stage, references: References
) -> None:
    cuda.measure(references=references)
    record = cuda.measure(optimizations=("fp32", "model_offload"), references=references)
    _, reference, compared = cuda.jobs  # what the first has kept has weights made on the GPU
    assert (reference["reference"], reference["on_host"]) == (True, True)
    assert compared["compare_output"] == reference["keep_output"] != cuda.jobs[0]["keep_output"]
    assert "on_host" not in compared
    assert record.exactness is not None


def test_a_reference_that_swallows_an_out_of_memory_says_so(cuda: Stage, references: References) -> None:
    record = cuda.measure(case=TILED, references=references, no_reference=SWALLOWED)
    assert record.unavailable["exactness"].endswith(": out of memory, and then: RuntimeError: shapes")


def test_a_reference_that_fails_is_the_reason_and_is_not_tried_again(cuda: Stage, references: References) -> None:
    failed = {"status": "oom", "phase": "decode", "message": f"OutOfMemoryError in {Path.home()}/a"}
    records = [cuda.measure(case=TILED, references=references, no_reference=failed) for _ in range(2)]
    for record in records:
        assert (record.status, record.exactness, record.exact) == ("ok", None, None)
        assert record.unavailable["exactness"].endswith("gave no output to compare with: OutOfMemoryError in ~/a")
        assert case_of("fp32").id in record.unavailable["exactness"]
    assert ["reference" in job for job in cuda.jobs] == [True, False, False]


@pytest.mark.parametrize(
    ("compared", "reason"),
    [
        ({"difference_error": "the outputs have different shapes"}, "^the outputs have different shapes$"),
        ({"difference_error": f"{Path.home()}/a is gone"}, "^~/a is gone$"),
        ({}, "not reported"),
        ({"difference": {**DIFFERENCE, "max_abs_difference": 1.5}}, "impossible figures"),
        ({"difference": {**DIFFERENCE, "mean_abs_difference": math.nan}}, "impossible figures"),
        ({"difference": {"max_abs_difference": 0.5}}, "impossible figures"),
    ],
)
def test_an_output_that_could_not_be_compared(
    cuda: Stage, references: References, compared: dict[str, Any], reason: str
) -> None:
    record = cuda.measure(case=TILED, references=references, compared=compared)
    assert (record.status, record.exactness) == ("ok", None)
    assert re.search(reason, record.unavailable["exactness"])


def test_a_case_that_failed_is_not_compared(cuda: Stage, references: References) -> None:
    failed = {"status": "oom", "phase": "decode", "message": "x", "difference": DIFFERENCE}
    record = cuda.measure(case=TILED, references=references, failed=failed)
    assert (record.status, record.exactness) == ("oom", None)


def test_ctrl_c_while_a_reference_is_made(cuda: Stage, references: References) -> None:
    cuda.starter.interrupted = 1
    with pytest.raises(CaseInterrupted) as caught:
        cuda.measure(case=TILED, references=references)
    record = caught.value.record
    assert (record.id, record.status, failure_of(record).message) == (TILED.id, "error", "interrupted")
    assert cuda.leftovers == []


def test_the_comparison_outlives_the_search(cuda: Stage, references: References) -> None:
    record = cuda.search(case=TILED, references=references)
    assert record.exactness == Exactness(against=case_of("fp32").id, **DIFFERENCE)
    assert record.memory.need_bytes is not None


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


def test_a_worker_that_crashes(cpu: Stage) -> None:
    failure = failure_of(cpu.measure("die", signal=11))
    assert (failure.phase, failure.message) == ("load", "the worker was killed by signal 11 in load")


@pytest.mark.parametrize("task", ["sleep", "freeze"])
def test_a_worker_that_hangs(cpu: Stage, task: str) -> None:
    record = cpu.measure(task, settings={"timeout_s": 0.2})
    assert record.status == "timeout"
    assert failure_of(record) == Failure(phase="load", message="no result within 0.2 s in load (--vram-timeout)")


def test_a_worker_that_cannot_be_started(cpu: Stage) -> None:
    cpu.machine.starter = Broken()
    record = cpu.measure()
    assert (record.status, failure_of(record).message) == ("error", "the fork server is gone")


def test_a_fork_server_that_dies_costs_neither_the_case_nor_the_next() -> None:
    server = ForkServer(["tests.measure.tasks"])
    try:
        stage = Stage(server, "cuda", Card())
        record = stage.search(kill_server=True)  # by the first worker
        assert (record.status, record.failure) == ("ok", None)
        assert record.memory.need_bytes  # by workers of another server
        assert record.disturbed == f"the fork server {KILLED}"
        assert stage.measure().disturbed is None
    finally:
        server.close()


def test_a_fork_server_that_dies_with_its_worker_costs_the_case() -> None:
    server = ForkServer(["tests.measure.tasks"])
    try:
        stage = Stage(server, "cpu")
        record = stage.measure("die", kill_server=True)
        assert record.status == "error"
        assert failure_of(record).message.startswith("the worker ended, nobody knows how")
        assert record.disturbed == f"the fork server {KILLED}"
        assert stage.measure().status == "ok"
    finally:
        server.close()


@pytest.mark.parametrize("when", ["the case begins", "the need is searched"])
def test_a_host_with_no_room_for_a_folder_costs_the_case_or_the_need(
    cuda: Stage, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{tempfile.gettempdir()}/x")

    if when == "the case begins":
        monkeypatch.setattr(measurement, "TemporaryDirectory", full)
        record = cuda.search()
        assert (record.status, failure_of(record).message) == ("error", "No space left on device: <tmp>/x")
    else:
        monkeypatch.setattr(measurement.CaseWorkers, "probe", full)
        record = cuda.search()
        assert_no_need(record, "^it failed, but not for memory: No space left on device: <tmp>/x$")
        assert record.time.median_s == pytest.approx(1.0)


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


def test_an_out_of_memory_that_is_swallowed_says_so(cuda: Stage) -> None:
    failure = failure_of(cuda.measure(limit_mib=2000, failed=SWALLOWED))
    assert failure.message == "out of memory, and then: RuntimeError: shapes"


def test_what_fails_without_the_limit_too_is_no_out_of_memory(cuda: Stage) -> None:
    record = cuda.measure(limit_mib=2000, failed=SWALLOWED, with_room=OTHER)
    assert (record.status, failure_of(record).message) == ("error", OTHER["message"])


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


def test_no_more_workers_when_more_was_mapped_than_the_cap_says(server: ForkServer) -> None:
    stage = Stage(server, "cuda", Card(1000))
    stage.machine.context_bytes = 400 * MIB
    record = stage.measure(limit_mib=1000, done={"reserved_peak_bytes": 610 * MIB})
    assert stage.story.caps == [f"cap {600 * MIB}"]
    assert (record.status, record.memory.reserved_peak_bytes) == ("ok", 610 * MIB)


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


def test_throttled_rounds_are_repeated_discarded_and_counted(cuda: Stage, card: Card) -> None:
    card.throttle = lambda worker, index: ["hw_thermal_slowdown"] if index in (1, 3) else ["sw_power_cap"]
    rounds = [{**ROUND, "denoise": seconds} for seconds in (0.6, 99.0, 0.8)]
    steps = [{"later": seconds} for seconds in (0.2, 30.0, 0.3)]
    record = cuda.measure(done={"rounds": rounds, "steps": steps}, repeated=3)
    assert record.time.rounds_discarded == 2
    assert record.time.workers[0].rounds_s == pytest.approx([1.0, 1.2, 1.0])
    assert record.time.step_s == pytest.approx(0.2)
    assert record.phases["denoise"].time_s == pytest.approx(0.6)  # without the 99
    assert [r.throttle for r in record.telemetry.rounds] == [
        ["sw_power_cap"],
        ["hw_thermal_slowdown"],
        ["sw_power_cap"],
        ["hw_thermal_slowdown"],
        ["sw_power_cap"],
    ]
    assert record.disturbed is None
    (channel,) = cuda.starter.channels
    assert [told["throttled"] for told in channel.told if "throttled" in told] == [[1], [1, 3], [1, 3]]
    assert cuda.story.texts[-2:] == ["round 5 of 5", "2 rounds ran on a throttled GPU"]


def test_rounds_that_are_all_throttled_are_kept_and_called_disturbed(cuda: Stage, card: Card) -> None:
    card.throttle = lambda worker, index: ["hw_slowdown"]
    record = cuda.measure(repeated=2)
    assert (record.status, record.disturbed) == ("ok", "every round of a worker ran on a throttled GPU")
    assert len(record.time.workers[0].rounds_s) == 5
    assert record.time.rounds_discarded == 0


@pytest.mark.parametrize(("throttled", "disturbed"), [([], False), ([1], True), ([2], True), ([1, 2], True)])
def test_a_worker_that_was_throttled_throughout_is_said_and_its_rounds_are_not_discarded(
    cuda: Stage, card: Card, throttled: list[int], disturbed: bool
) -> None:
    card.throttle = lambda worker, index: ["hw_slowdown"] if worker in throttled else []
    record = cuda.measure(settings={"workers": 2})
    assert (record.disturbed == "every round of a worker ran on a throttled GPU") is disturbed

"""Peaks of one worker and the GPU's state by round, from readings that are replayed."""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import pytest

from pytest_vram.measure import nvml, sampling
from pytest_vram.measure.sampling import STATE_INTERVAL_S, Batch, Sampler
from pytest_vram.records.schema import RoundTelemetry

MIB = 1 << 20
PID = 4711
UNKNOWN = nvml.State(None, None, None, None)
Processes = dict[int, int | None]


class ReplayedGpu(nvml.Gpu):
    """Gives these readings one after another; MiB."""

    def __init__(
        self, used: Iterable[int | None] = (), processes: Iterable[Processes] = (), states: Iterable[nvml.State] = ()
    ) -> None:
        self._used, self._processes, self._states = iter(used), iter(processes), iter(states)

    def used_bytes(self) -> int | None:
        used = next(self._used, None)
        return None if used is None else used * MIB

    def processes(self) -> dict[int, int | None]:
        found = next(self._processes, {})
        return {pid: None if used is None else used * MIB for pid, used in found.items()}

    def state(self) -> nvml.State:
        return next(self._states)

    def energy_mj(self) -> int | None:
        return None


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sampling, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def state(mhz: int | None = 1980, celsius: int | None = 60, watts: float | None = 300.0, *throttle: str) -> nvml.State:
    return nvml.State(mhz, celsius, watts, throttle)


def sampled(gpu: nvml.Gpu | None, times: int, baseline_mib: int = 0) -> Sampler:
    sampler = Sampler(gpu, PID, baseline_mib * MIB)
    for _ in range(times):
        sampler.sample()
    return sampler


def test_the_peak_is_the_highest_reading_and_now_is_the_last() -> None:
    gpu = ReplayedGpu([700, 1500, 900], [{PID: 200}, {PID: 1000}, {PID: 400}])
    sampler = sampled(gpu, 3, baseline_mib=500)
    assert (sampler.process_peak, sampler.process_now) == (1000 * MIB, 400 * MIB)
    assert (sampler.device_peak, sampler.device_now) == (1000 * MIB, 400 * MIB)  # less what others held before
    assert sampler.others == set()


def test_a_device_below_its_baseline_is_no_negative_peak() -> None:
    assert sampled(ReplayedGpu([400, 450]), 2, baseline_mib=500).device_peak == 0


def test_unread_memory_is_none() -> None:
    sampler = sampled(ReplayedGpu([None], [{PID: None}]), 1)
    assert (sampler.process_peak, sampler.process_now) == (None, None)
    assert (sampler.device_peak, sampler.device_now) == (None, None)


def test_without_nvml_nothing_is_sampled() -> None:
    sampler = sampled(None, 2)
    assert (sampler.process_peak, sampler.device_peak, sampler.held_outside(0)) == (None, None, None)
    assert sampler.end_round() == RoundTelemetry()


@pytest.mark.parametrize(
    ("seen", "before", "others"),
    [
        ([{PID: 1}, {PID: 1, 5: 100}, {PID: 1, 6: None}], (), {5, 6}),
        ([{5: 100}, {PID: 1, 5: 100}], (), {5}),  # there before the worker has come
        ([{5: 100, PID: 1}], (5,), {5}),  # --vram-allow-shared
        # in a container NVML speaks of pids of the host: the worker is one of them
        ([{90001: 100}] * 2, (), set()),
        ([{90001: 100}, {90001: 100, 90002: 1}], (), {90002}),
        ([{5: 100}, {5: 100, 90001: 100}, {5: 100, 90001: 100}], (5,), {5}),
        ([{90001: 100, 90002: 1}], (), {90001, 90002}),  # which is the worker is not known
        ([{0: 100}] * 2, (), set()),
        ([{}] * 2, (), set()),
    ],
)
def test_who_else_is_on_the_gpu(seen: list[Processes], before: Sequence[int], others: set[int]) -> None:
    sampler = Sampler(ReplayedGpu([], seen), PID, 0, frozenset(before))
    for _ in seen:
        sampler.sample()
    assert sampler.others == others


def test_a_figure_is_that_of_the_last_reading_or_none() -> None:
    sampler = sampled(ReplayedGpu([1300, None], [{PID: 1100}, {}]), 2)
    assert (sampler.process_now, sampler.device_now, sampler.held_outside(0)) == (None, None, None)
    assert (sampler.process_peak, sampler.device_peak) == (1100 * MIB, 1300 * MIB)
    assert sampler.stopped
    assert not sampled(ReplayedGpu([None, 1300]), 2).stopped
    assert not sampled(ReplayedGpu([None]), 1).stopped  # it never answered


class Metered(ReplayedGpu):
    """Has taken a joule more each time it is asked."""

    joules = 0

    def energy_mj(self) -> int | None:
        self.joules += 1
        return self.joules * 1000


def test_batches_have_the_counter_before_and_after_them(clock: Clock) -> None:
    sampler = Sampler(Metered(states=[state()] * 3), PID, 0)
    sampler.begin_batch()
    sampler.end_round()
    sampler.end_round()
    clock.now += 3
    sampler.end_batch()
    sampler.begin_batch()
    sampler.end_round()
    clock.now += 1
    sampler.end_batch()
    assert sampler.batches == [Batch(0, 100.0, 1000, 2, 3.0, 2000), Batch(2, 103.0, 3000, 3, 1.0, 4000)]
    assert len(sampler.telemetry) == 3


@pytest.mark.parametrize(
    ("process", "device", "reserved", "context"),
    [
        (1100, 1300, 600, 500),  # the process's own figure comes first
        (None, 1300, 600, 700),  # the device less its baseline stands in
        (600, 1300, 600, None),
        (500, 1300, 600, None),
        (None, None, 600, None),
    ],
)
def test_the_context_is_what_is_held_outside_the_pool(
    process: int | None, device: int | None, reserved: int, context: int | None
) -> None:
    sampler = sampled(ReplayedGpu([device], [{} if process is None else {PID: process}]), 1)
    assert sampler.held_outside(reserved * MIB) == (None if context is None else context * MIB)


def test_a_round_has_its_own_states(clock: Clock) -> None:
    first = [
        state(1900, 61, 300.0, "sw_power_cap", "gpu_idle"),
        state(1800, 63, 310.0),
        state(1700, 62, 350.5, "hw_slowdown"),
    ]
    second = [state(1500, 70, 400.0, "gpu_idle")]
    sampler = Sampler(ReplayedGpu(states=first + second), PID, 0)
    for _ in first:
        sampler.sample(states=True)
        clock.now += 1.01 * STATE_INTERVAL_S
    assert sampler.end_round() == RoundTelemetry(
        sm_clock_mhz=1800, temperature_c=63, power_w=320.2, throttle=["hw_slowdown", "sw_power_cap"]
    )
    sampler.sample(states=True)
    assert sampler.end_round() == RoundTelemetry(sm_clock_mhz=1500, temperature_c=70, power_w=400.0)


def test_states_are_read_when_asked_for_and_not_too_often(clock: Clock) -> None:
    sampler = Sampler(ReplayedGpu(states=[state(1000), state(2000), state(3000)]), PID, 0)
    sampler.sample()
    for passed_s in (0, STATE_INTERVAL_S / 2, STATE_INTERVAL_S / 4, STATE_INTERVAL_S / 3):
        clock.now += passed_s
        sampler.sample(states=True)
    assert sampler.end_round().sm_clock_mhz == 1500  # two readings


def test_a_round_shorter_than_the_interval_is_read_once_at_its_end(clock: Clock) -> None:
    sampler = Sampler(ReplayedGpu(states=[state(1111)]), PID, 0)
    assert sampler.end_round().sm_clock_mhz == 1111


def test_what_the_driver_does_not_say_is_none(clock: Clock) -> None:
    sampler = Sampler(ReplayedGpu(states=[UNKNOWN, state(1500, None, None)]), PID, 0)
    sampler.sample(states=True)
    clock.now += 1.01 * STATE_INTERVAL_S
    sampler.sample(states=True)
    assert sampler.end_round() == RoundTelemetry(sm_clock_mhz=1500)
    assert sampler.throttle_known
    unknown = Sampler(ReplayedGpu(states=[UNKNOWN]), PID, 0)
    assert unknown.end_round() == RoundTelemetry()
    assert not unknown.throttle_known

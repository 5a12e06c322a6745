"""NVML read from outside the worker, so that sampling takes nothing from the worker's interpreter."""

import statistics
import time
from dataclasses import dataclass, field

from pytest_vram.measure import nvml
from pytest_vram.records.schema import RoundTelemetry

MEMORY_INTERVAL_S = 0.005  # a read takes 60 µs
STATE_INTERVAL_S = 0.02


@dataclass
class Batch:
    """Rounds that ran one after the other, `first` to `end` - 1, and the GPU's energy counter (millijoules) before and
    after them; None where NVML did not say."""

    first: int
    began_s: float
    began_mj: int | None
    end: int = 0
    seconds: float = 0.0
    ended_mj: int | None = None


@dataclass
class Sampler:
    """Peaks of one worker's memory, and the GPU's state by round. Bytes; `baseline` is what others held before, and
    `before` are the processes that were there then."""

    gpu: nvml.Gpu | None
    pid: int
    baseline: int
    before: frozenset[int] = frozenset()
    process_peak: int | None = None
    device_peak: int | None = None
    process_now: int | None = None
    device_now: int | None = None
    others: set[int] = field(default_factory=set)
    telemetry: list[RoundTelemetry] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    answered: bool = False  # whether NVML has told the memory in use, ever
    throttle_known: bool = False
    _states: list[nvml.State] = field(default_factory=list)
    _last_state: float = 0.0
    _listed: bool = False  # under its own pid
    _alias: int | None = None  # else what seems to be the worker

    def sample(self, states: bool = False) -> None:
        """Read memory; and, at most every 20 ms, the state where `states` is set."""
        if self.gpu is None:
            return
        used = self.gpu.used_bytes()
        self.device_now = None if used is None else used - self.baseline
        if self.device_now is not None:
            self.answered = True
            self.device_peak = max(self.device_peak or 0, self.device_now)
        self.look_around()
        now = time.monotonic()
        if states and now - self._last_state >= STATE_INTERVAL_S:
            self._last_state = now
            self._states.append(self.gpu.state())

    def look_around(self) -> None:
        """Read the processes: the worker's memory, and who else is there."""
        if self.gpu is None:
            return
        processes = self.gpu.processes()
        self.process_now = processes.get(self.pid)
        if self.process_now:
            self.process_peak = max(self.process_peak or 0, self.process_now)
        if self.pid in processes:
            self._listed = True
            self.others |= processes.keys() - {self.pid}
        elif not self._listed:  # in some containers NVML speaks of pids of the host: the first to come is the worker
            came = processes.keys() - self.before
            if self._alias is None and len(came) == 1:
                (self._alias,) = came
            elif came:
                self.others |= processes.keys() - {self._alias}

    @property
    def stopped(self) -> bool:
        """Whether NVML answered and then, to the end, did not."""
        return self.answered and self.device_now is None

    def begin_batch(self) -> None:
        """Rounds follow, one after the other."""
        energy = self.gpu.energy_mj() if self.gpu else None
        self.batches.append(Batch(len(self.telemetry), time.monotonic(), energy))

    def end_batch(self) -> None:
        """The last of them has ended."""
        batch = self.batches[-1]
        batch.seconds, batch.end = time.monotonic() - batch.began_s, len(self.telemetry)
        batch.ended_mj = self.gpu.energy_mj() if self.gpu else None

    def end_round(self) -> RoundTelemetry:
        """The state during the round that has just ended."""
        if self.gpu is not None and not self._states:
            self._states.append(self.gpu.state())
        states, self._states = self._states, []
        clocks = [s.sm_clock_mhz for s in states if s.sm_clock_mhz is not None]
        temperatures = [s.temperature_c for s in states if s.temperature_c is not None]
        powers = [s.power_w for s in states if s.power_w is not None]
        reasons = [s.throttle for s in states if s.throttle is not None]
        self.throttle_known |= bool(reasons)
        self.telemetry.append(
            RoundTelemetry(
                sm_clock_mhz=int(statistics.median(clocks)) if clocks else None,
                temperature_c=max(temperatures, default=None),
                power_w=round(statistics.fmean(powers), 1) if powers else None,
                throttle=sorted({name for names in reasons for name in names} - {"gpu_idle"}),
            )
        )
        return self.telemetry[-1]

    def held_outside(self, reserved: int) -> int | None:
        """What the worker holds outside PyTorch's allocator now: its context."""
        held = self.process_now or self.device_now
        return None if held is None or held <= reserved else held - reserved

"""NVML read from outside the worker, so that sampling takes nothing from the worker's interpreter."""

import statistics
import time
from dataclasses import dataclass, field

from pytest_vram.measure import nvml
from pytest_vram.records.schema import RoundTelemetry

MEMORY_INTERVAL_S = 0.005  # a read takes 60 µs
STATE_INTERVAL_S = 0.02


@dataclass
class Sampler:
    """Peaks of one worker's memory, and the GPU's state by round. Bytes; `baseline` is what others held before."""

    gpu: nvml.Gpu | None
    pid: int
    baseline: int
    process_peak: int | None = None
    device_peak: int | None = None
    process_now: int | None = None
    device_now: int | None = None
    others: set[int] = field(default_factory=set)
    _states: list[nvml.State] = field(default_factory=list)
    _last_state: float = 0.0

    def sample(self, states: bool = False) -> None:
        """Read memory; and, at most every 20 ms, the state where `states` is set."""
        if self.gpu is None:
            return
        used = self.gpu.used_bytes()
        if used is not None:
            self.device_now = used - self.baseline
            self.device_peak = max(self.device_peak or 0, self.device_now)
        processes = self.gpu.processes()
        if self.pid in processes:
            self.process_now = processes[self.pid]
            if self.process_now:
                self.process_peak = max(self.process_peak or 0, self.process_now)
            self.others |= processes.keys() - {self.pid}
        now = time.monotonic()
        if states and now - self._last_state >= STATE_INTERVAL_S:
            self._last_state = now
            self._states.append(self.gpu.state())

    def end_round(self) -> RoundTelemetry:
        """The state during the round that has just ended."""
        if self.gpu is not None and not self._states:
            self._states.append(self.gpu.state())
        states, self._states = self._states, []
        clocks = [s.sm_clock_mhz for s in states if s.sm_clock_mhz is not None]
        temperatures = [s.temperature_c for s in states if s.temperature_c is not None]
        powers = [s.power_w for s in states if s.power_w is not None]
        return RoundTelemetry(
            sm_clock_mhz=int(statistics.median(clocks)) if clocks else None,
            temperature_c=max(temperatures, default=None),
            power_w=round(statistics.fmean(powers), 1) if powers else None,
            throttle=sorted({reason for s in states for reason in s.throttle} - {"gpu_idle"}),
        )

    def held_outside(self, reserved: int) -> int | None:
        """What the worker holds outside PyTorch's allocator now: its context."""
        held = self.process_now or self.device_now
        return None if held is None or held <= reserved else held - reserved

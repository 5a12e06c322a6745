"""NVML: what the driver says of a GPU and its processes. The one module that imports pynvml; it changes no setting."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml

from pytest_vram.errors import VramError

# nvml.h, nvmlClocksEventReasons; the names of the constants differ between versions of the bindings
THROTTLE_REASONS = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


class NvmlUnavailable(VramError):
    """NVML is not there, or does not know the GPU."""


@dataclass(frozen=True)
class State:
    """The GPU at one moment; None where the driver does not say."""

    sm_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    throttle: tuple[str, ...]


def _read(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The answer, or None where this GPU or driver does not support the question."""
    with contextlib.suppress(pynvml.NVMLError):
        return function(*args, **kwargs)
    return None


def _start() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"no NVIDIA driver answers ({error})") from error


def driver_version() -> str:
    """Raises NvmlUnavailable without a driver."""
    _start()
    return str(pynvml.nvmlSystemGetDriverVersion())


def gpus() -> list["Gpu"]:
    """All GPUs of this machine; raises NvmlUnavailable without a driver."""
    _start()
    return [Gpu(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]


def gpu_by_uuid(uuid: str) -> "Gpu":
    """The GPU that CUDA calls by this uuid: the two libraries may number GPUs differently.

    Raises:
        NvmlUnavailable: without a driver, or where NVML knows no such GPU.
    """
    _start()
    for candidate in (uuid, f"GPU-{uuid}", f"MIG-{uuid}"):
        handle = _read(pynvml.nvmlDeviceGetHandleByUUID, candidate)
        if handle is not None:
            return Gpu(handle)
    raise NvmlUnavailable(f"NVML knows no GPU with the uuid {uuid}")


class Gpu:
    """One GPU, or one MIG instance."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.name = str(_read(pynvml.nvmlDeviceGetName, handle) or "unknown GPU")
        # version 1 counts the driver's own reserve as used: 480 MiB on an idle H100
        version = getattr(pynvml, "nvmlMemory_v2", None)
        self._memory = {"version": version} if version and self._reads(version) else {}

    def _reads(self, version: int) -> bool:
        return _read(pynvml.nvmlDeviceGetMemoryInfo, self._handle, version=version) is not None

    def used_bytes(self) -> int | None:
        """Memory in use on the whole device."""
        info = _read(pynvml.nvmlDeviceGetMemoryInfo, self._handle, **self._memory)
        return None if info is None else int(info.used)

    def total_bytes(self) -> int | None:
        """Memory of the device."""
        info = _read(pynvml.nvmlDeviceGetMemoryInfo, self._handle, **self._memory)
        return None if info is None else int(info.total)

    def uuid(self) -> str | None:
        """As nvidia-smi -L shows it: `GPU-…`, of a MIG instance `MIG-…`."""
        found = _read(pynvml.nvmlDeviceGetUUID, self._handle)
        return None if found is None else str(found)

    def compute_capability(self) -> tuple[int, int] | None:
        """Its major and minor version."""
        found = _read(pynvml.nvmlDeviceGetCudaComputeCapability, self._handle)
        return None if found is None else (int(found[0]), int(found[1]))

    def processes(self) -> dict[int, int | None]:
        """Bytes by pid of the processes that compute here; None where the driver does not say how much."""
        found = _read(pynvml.nvmlDeviceGetComputeRunningProcesses, self._handle) or []
        return {process.pid: process.usedGpuMemory for process in found}

    def state(self) -> State:
        """Clock, temperature, power and throttle reasons now."""
        handle = self._handle
        power_mw = _read(pynvml.nvmlDeviceGetPowerUsage, handle)
        names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        answers = (_read(function, handle) for name in names if (function := getattr(pynvml, name, None)))
        reasons = next((answer for answer in answers if answer is not None), 0)  # an older driver knows the older name
        return State(
            sm_clock_mhz=_read(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            temperature_c=_read(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
            power_w=None if power_mw is None else power_mw / 1000,
            throttle=tuple(name for bit, name in THROTTLE_REASONS.items() if reasons & bit),
        )

    def power_limit_w(self) -> float | None:
        """The enforced power limit."""
        limit = _read(pynvml.nvmlDeviceGetEnforcedPowerLimit, self._handle)
        return None if limit is None else limit / 1000

    def mig(self) -> bool | None:
        """Whether MIG is on; None where the GPU has none."""
        mode = _read(pynvml.nvmlDeviceGetMigMode, self._handle)
        return None if mode is None else bool(mode[0])

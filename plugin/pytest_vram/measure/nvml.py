"""NVML: what the driver says of a GPU and its processes. The one module that imports pynvml; it changes no setting.

An answer that cannot be true is none: drivers say "not available" as the highest number there is, and some say 0.
"""

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

NOT_AVAILABLE = (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)  # nvml.h, NVML_VALUE_NOT_AVAILABLE of 32 and 64 bits
MOST_CELSIUS = 150  # GPUs shut down near 100
MOST_MHZ = 10_000
MOST_W = 10_000


class NvmlUnavailable(VramError):
    """NVML is not there, or does not know the GPU."""


@dataclass(frozen=True)
class State:
    """The GPU at one moment; None where the driver does not say."""

    sm_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    throttle: tuple[str, ...] | None


def _read(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The answer, or None where this GPU or driver does not support the question."""
    with contextlib.suppress(pynvml.NVMLError):
        return function(*args, **kwargs)
    return None


def _within(answer: Any, least: int, most: int) -> int | None:
    """The answer where it is a number from `least` to `most`."""
    if not isinstance(answer, int) or answer in NOT_AVAILABLE or not least <= answer <= most:
        return None
    return answer


def _start() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"no NVIDIA driver answers ({error})") from error


def driver_version() -> str:
    """Raises NvmlUnavailable without a driver."""
    _start()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"the NVIDIA driver does not tell its version ({error})") from error


def gpus() -> list["Gpu"]:
    """All GPUs of this machine; raises NvmlUnavailable without a driver."""
    _start()
    try:
        return [Gpu(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"the NVIDIA driver does not tell its GPUs ({error})") from error


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
        memory = self._bytes()
        return memory and memory[0]

    def total_bytes(self) -> int | None:
        """Memory of the device."""
        memory = self._bytes()
        return memory and memory[1]

    def _bytes(self) -> tuple[int, int] | None:
        """Used and total; None where they cannot be true."""
        info = _read(pynvml.nvmlDeviceGetMemoryInfo, self._handle, **self._memory)
        total = None if info is None else _within(info.total, 1, 1 << 50)
        used = None if total is None else _within(info.used, 0, total)
        return None if total is None or used is None else (used, total)

    def uuid(self) -> str | None:
        """As nvidia-smi -L shows it: `GPU-…`, of a MIG instance `MIG-…`."""
        found = _read(pynvml.nvmlDeviceGetUUID, self._handle)
        return None if found is None else str(found)

    def whole(self) -> "Gpu | None":
        """The GPU that a MIG instance is a part of; None for a GPU that is whole."""
        if not _read(pynvml.nvmlDeviceIsMigDeviceHandle, self._handle):
            return None
        handle = _read(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, self._handle)
        return None if handle is None else Gpu(handle)

    def compute_capability(self) -> tuple[int, int] | None:
        """Its major and minor version."""
        found = _read(pynvml.nvmlDeviceGetCudaComputeCapability, self._handle)
        return None if found is None else (int(found[0]), int(found[1]))

    def processes(self) -> dict[int, int | None]:
        """Bytes by pid of the processes that compute here; None where the driver does not say how much."""
        found = _read(pynvml.nvmlDeviceGetComputeRunningProcesses, self._handle) or []
        memory = self._bytes() if found else None
        most = memory[1] if memory else 1 << 50
        return {process.pid: _within(process.usedGpuMemory, 1, most) for process in found}

    def state(self) -> State:
        """Clock, temperature, power and throttle reasons now."""
        handle = self._handle
        power_mw = _within(_read(pynvml.nvmlDeviceGetPowerUsage, handle), 1, MOST_W * 1000)
        clock = _read(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM)
        temperature = _read(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
        reasons = self._throttle_reasons()
        return State(
            sm_clock_mhz=_within(clock, 1, MOST_MHZ),
            temperature_c=_within(temperature, 1, MOST_CELSIUS),
            power_w=None if power_mw is None else power_mw / 1000,
            throttle=None
            if reasons is None
            else tuple(name for bit, name in THROTTLE_REASONS.items() if reasons & bit),
        )

    def _throttle_reasons(self) -> int | None:
        names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        answers = (_read(function, self._handle) for name in names if (function := getattr(pynvml, name, None)))
        found = next((answer for answer in answers if answer is not None), None)  # older drivers know the older name
        return _within(found, 0, 1 << 63)

    def power_limit_w(self) -> float | None:
        """The enforced power limit."""
        limit = _within(_read(pynvml.nvmlDeviceGetEnforcedPowerLimit, self._handle), 1, MOST_W * 1000)
        return None if limit is None else limit / 1000

    def energy_mj(self) -> int | None:
        """Millijoules that the board has taken since the driver was loaded; from Volta on."""
        return _within(_read(pynvml.nvmlDeviceGetTotalEnergyConsumption, self._handle), 1, 1 << 63)

    def driver_model(self) -> str | None:
        """On Windows `WDDM`, `WDM` (also called TCC) or `MCDM`; None elsewhere."""
        found = _read(pynvml.nvmlDeviceGetDriverModel, self._handle)
        current = found[0] if isinstance(found, (list, tuple)) else found
        names = {0: "WDDM", 1: "WDM", 2: "MCDM"}  # nvml.h, nvmlDriverModel_t; older bindings lack the last
        return names.get(current) if isinstance(current, int) else None

    def mig(self) -> bool | None:
        """Whether MIG is on; None where the GPU has none."""
        mode = _read(pynvml.nvmlDeviceGetMigMode, self._handle)
        return None if mode is None else bool(mode[0])

"""What is asked of NVML and what its answers become; the driver is played."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pytest_vram.measure import nvml
from pytest_vram.records.schema import ABNORMAL

HANDLE = "the handle"


class Driver:
    """Every question is unsupported until it is given an answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        for name in dir(pynvml):
            if name.startswith(("nvmlDeviceGet", "nvmlSystemGet")):
                self.refuses(name)
        self.answers("nvmlInit", lambda: None)

    def answers(self, name: str, function: Callable[..., Any]) -> None:
        self._monkeypatch.setattr(pynvml, name, function)

    def refuses(self, name: str, code: int = pynvml.NVML_ERROR_NOT_SUPPORTED) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise pynvml.NVMLError(code)

        self.answers(name, refuse)

    def has_no(self, name: str) -> None:
        self._monkeypatch.delattr(pynvml, name)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def memory_of(version: int | None, v2_works: bool) -> Any:
    if version is None:
        return SimpleNamespace(used=1480, total=80_000)
    if not v2_works:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    assert version == pynvml.nvmlMemory_v2
    return SimpleNamespace(used=1000, total=79_520)


def test_memory_is_asked_with_version_2(driver: Driver) -> None:
    driver.answers("nvmlDeviceGetMemoryInfo", lambda handle, version=None: memory_of(version, True))
    gpu = nvml.Gpu(HANDLE)
    assert (gpu.used_bytes(), gpu.total_bytes()) == (1000, 79_520)


@pytest.mark.parametrize("too_old", ["driver", "bindings"])
def test_memory_falls_back_to_version_1_and_says_so(driver: Driver, too_old: str) -> None:
    driver.answers("nvmlDeviceGetMemoryInfo", lambda handle, version=None: memory_of(version, too_old == "bindings"))
    if too_old == "bindings":
        driver.has_no("nvmlMemory_v2")
    gpu = nvml.Gpu(HANDLE)
    assert (gpu.used_bytes(), gpu.total_bytes()) == (1480, 80_000)


def test_unsupported_questions_have_no_answer(driver: Driver) -> None:
    gpu = nvml.Gpu(HANDLE)
    assert gpu.name == "unknown GPU"
    assert (gpu.used_bytes(), gpu.total_bytes(), gpu.power_limit_w(), gpu.mig()) == (None, None, None, None)
    assert gpu.processes() == {}
    assert gpu.state() == nvml.State(None, None, None, None)


def test_the_state_in_its_units(driver: Driver) -> None:
    driver.answers("nvmlDeviceGetPowerUsage", lambda handle: 123_456)
    driver.answers("nvmlDeviceGetEnforcedPowerLimit", lambda handle: 700_000)
    driver.answers("nvmlDeviceGetClockInfo", lambda handle, clock: {pynvml.NVML_CLOCK_SM: 1980}[clock])
    driver.answers("nvmlDeviceGetTemperature", lambda handle, where: {pynvml.NVML_TEMPERATURE_GPU: 41}[where])
    driver.answers("nvmlDeviceGetCurrentClocksEventReasons", lambda handle: 0)
    gpu = nvml.Gpu(HANDLE)
    assert gpu.state() == nvml.State(sm_clock_mhz=1980, temperature_c=41, power_w=123.456, throttle=())
    assert gpu.power_limit_w() == 700


@pytest.mark.parametrize(
    ("constant", "name"),
    [
        ("GpuIdle", "gpu_idle"),
        ("ApplicationsClocksSetting", "applications_clocks_setting"),
        ("SwPowerCap", "sw_power_cap"),
        ("HwSlowdown", "hw_slowdown"),
        ("SyncBoost", "sync_boost"),
        ("SwThermalSlowdown", "sw_thermal_slowdown"),
        ("HwThermalSlowdown", "hw_thermal_slowdown"),
        ("HwPowerBrakeSlowdown", "hw_power_brake_slowdown"),
        ("DisplayClockSetting", "display_clock_setting"),
    ],
)
def test_each_throttle_bit_has_its_name(driver: Driver, constant: str, name: str) -> None:
    bit = getattr(pynvml, f"nvmlClocksEventReason{constant}")
    driver.answers("nvmlDeviceGetCurrentClocksEventReasons", lambda handle: bit | 1 << 40)
    assert nvml.Gpu(HANDLE).state().throttle == (name,)


@pytest.mark.parametrize("too_old", ["driver", "bindings"])
def test_throttle_reasons_by_their_old_name(driver: Driver, too_old: str) -> None:
    name = "nvmlDeviceGetCurrentClocksEventReasons"
    if too_old == "bindings":
        driver.has_no(name)
    else:  # drivers before 535
        driver.refuses(name, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    driver.answers("nvmlDeviceGetCurrentClocksThrottleReasons", lambda handle: 0x4 | 0x40)
    assert nvml.Gpu(HANDLE).state().throttle == ("sw_power_cap", "hw_thermal_slowdown")


def test_what_counts_as_abnormal_is_a_reason_that_is_decoded() -> None:
    assert set(nvml.THROTTLE_REASONS.values()) > ABNORMAL
    assert "sw_power_cap" not in ABNORMAL  # the normal state of a card under load


def test_processes_by_pid(driver: Driver) -> None:
    found = [SimpleNamespace(pid=10, usedGpuMemory=1000), SimpleNamespace(pid=11, usedGpuMemory=None)]
    driver.answers("nvmlDeviceGetComputeRunningProcesses", lambda handle: found)
    assert nvml.Gpu(HANDLE).processes() == {10: 1000, 11: None}


@pytest.mark.parametrize(("mode", "on"), [([1, 1], True), ([0, 1], False)])
def test_mig_is_what_is_on_now(driver: Driver, mode: list[int], on: bool) -> None:
    driver.answers("nvmlDeviceGetMigMode", lambda handle: mode)
    assert nvml.Gpu(HANDLE).mig() is on


@pytest.mark.parametrize("known", ["abc", "GPU-abc", "MIG-abc"])
def test_a_gpu_is_found_by_the_uuid_that_cuda_gives(driver: Driver, known: str) -> None:
    def by_uuid(uuid: str) -> str:
        if uuid != known:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return HANDLE

    driver.answers("nvmlDeviceGetHandleByUUID", by_uuid)
    driver.answers("nvmlDeviceGetName", lambda handle: f"the GPU of {handle}")
    assert nvml.gpu_by_uuid("abc").name == f"the GPU of {HANDLE}"
    with pytest.raises(nvml.NvmlUnavailable, match="other"):
        nvml.gpu_by_uuid("other")


def test_all_gpus_in_order(driver: Driver) -> None:
    driver.answers("nvmlDeviceGetCount", lambda: 2)
    driver.answers("nvmlDeviceGetHandleByIndex", lambda index: index)
    driver.answers("nvmlDeviceGetName", lambda handle: f"GPU {handle}")
    assert [gpu.name for gpu in nvml.gpus()] == ["GPU 0", "GPU 1"]


@pytest.mark.parametrize("ask", [nvml.driver_version, nvml.gpus, lambda: nvml.gpu_by_uuid("abc")])
@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_no_driver_is_one_error(driver: Driver, ask: Callable[[], object], code: int) -> None:
    driver.refuses("nvmlInit", code)
    with pytest.raises(nvml.NvmlUnavailable, match="no NVIDIA driver answers"):
        ask()


def test_the_drivers_version(driver: Driver) -> None:
    driver.answers("nvmlSystemGetDriverVersion", lambda: "580.95.05")
    assert nvml.driver_version() == "580.95.05"


# Answers that cannot be true


NOT_AVAILABLE = 2**64 - 1


@pytest.mark.parametrize("used", [NOT_AVAILABLE, 2**32 - 1, 80_001, -1, None, "much"])
def test_memory_that_cannot_be_in_use_is_none(driver: Driver, used: Any) -> None:
    driver.answers("nvmlDeviceGetMemoryInfo", lambda handle, **_: SimpleNamespace(used=used, total=80_000))
    assert nvml.Gpu(HANDLE).used_bytes() is None


@pytest.mark.parametrize("total", [0, NOT_AVAILABLE])
def test_a_gpu_with_no_memory_says_nothing_of_it(driver: Driver, total: int) -> None:
    driver.answers("nvmlDeviceGetMemoryInfo", lambda handle, **_: SimpleNamespace(used=0, total=total))
    gpu = nvml.Gpu(HANDLE)
    assert (gpu.used_bytes(), gpu.total_bytes()) == (None, None)


@pytest.mark.parametrize("used", [0, NOT_AVAILABLE, 80_001])
def test_a_process_whose_memory_cannot_be_true_is_there_and_has_none(driver: Driver, used: int) -> None:
    driver.answers("nvmlDeviceGetMemoryInfo", lambda handle, **_: SimpleNamespace(used=1000, total=80_000))
    found = [SimpleNamespace(pid=10, usedGpuMemory=used), SimpleNamespace(pid=11, usedGpuMemory=500)]
    driver.answers("nvmlDeviceGetComputeRunningProcesses", lambda handle: found)
    assert nvml.Gpu(HANDLE).processes() == {10: None, 11: 500}


@pytest.mark.parametrize("answer", [0, 2**32 - 1, NOT_AVAILABLE])
def test_a_state_that_cannot_be_is_none(driver: Driver, answer: int) -> None:
    for name in ("PowerUsage", "ClockInfo", "Temperature", "EnforcedPowerLimit", "TotalEnergyConsumption"):
        driver.answers(f"nvmlDeviceGet{name}", lambda *_: answer)
    driver.answers("nvmlDeviceGetCurrentClocksEventReasons", lambda handle: answer)
    gpu = nvml.Gpu(HANDLE)
    assert gpu.state() == nvml.State(None, None, None, () if answer == 0 else None)  # not throttled for all reasons
    assert (gpu.power_limit_w(), gpu.energy_mj()) == (None, None)


def test_the_energy_counter(driver: Driver) -> None:
    assert nvml.Gpu(HANDLE).energy_mj() is None  # before Volta
    driver.answers("nvmlDeviceGetTotalEnergyConsumption", lambda handle: 123_456_789)
    assert nvml.Gpu(HANDLE).energy_mj() == 123_456_789


@pytest.mark.parametrize(("model", "name"), [([0, 0], "WDDM"), ([1, 1], "WDM"), ([2, 2], "MCDM"), (0, "WDDM")])
def test_the_driver_model_of_windows(driver: Driver, model: Any, name: str) -> None:
    assert nvml.Gpu(HANDLE).driver_model() is None  # Linux
    driver.answers("nvmlDeviceGetDriverModel", lambda handle: model)
    assert nvml.Gpu(HANDLE).driver_model() == name


def test_a_mig_instance_knows_its_gpu(driver: Driver) -> None:
    driver.answers("nvmlDeviceGetUUID", lambda handle: f"uuid of {handle}")
    assert nvml.Gpu(HANDLE).whole() is None
    driver.answers("nvmlDeviceIsMigDeviceHandle", lambda handle: handle == "instance")
    driver.answers("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", lambda handle: HANDLE)
    whole = nvml.Gpu("instance").whole()
    assert whole is not None
    assert whole.uuid() == f"uuid of {HANDLE}"
    assert whole.whole() is None


def test_a_driver_that_answers_no_more_is_one_error(driver: Driver) -> None:
    driver.refuses("nvmlDeviceGetCount", pynvml.NVML_ERROR_GPU_IS_LOST)
    for ask in (nvml.gpus, nvml.driver_version):
        with pytest.raises(nvml.NvmlUnavailable, match="the NVIDIA driver does not tell its"):
            ask()

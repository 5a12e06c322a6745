"""What the workers of a session run on: started here, asked once, handed back at the end."""

import contextlib
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pytest_vram.cases.models import Model
from pytest_vram.errors import StartError, UsageError
from pytest_vram.measure import nvml
from pytest_vram.measure.channel import Closed
from pytest_vram.measure.environment import hidden
from pytest_vram.measure.forkserver import PRELOAD_ENVIRON, ForkServer, Spawner, Starter
from pytest_vram.measure.locking import Locks, NotLocked, lock_gpus, visible_gpus
from pytest_vram.records.schema import ASSUMED_CONTEXT_BYTES

Device = Literal["meta", "cpu", "cuda"]
CANARY = "pytest_vram.measure.probes:canary"
CANARY_TIMEOUT_S = 120.0
CHECK = "pytest_vram.measure.probes:check_models"
CHECK_TIMEOUT_S = 300.0
SETTLE_S = 3.0  # how long the driver may take to free what a finished worker held
SETTLED_BYTES = 16 << 20


@dataclass
class Machine:
    """The device, what starts workers on it, and how to read its memory.

    `context_bytes` is what the canary held outside PyTorch's allocator, or an assumption; `cannot` says why a figure
    cannot be read.
    """

    device: Device
    starter: Starter
    facts: dict[str, Any] = field(default_factory=dict)
    gpu: nvml.Gpu | None = None
    others: list[nvml.Gpu | None] = field(default_factory=list)  # the GPUs beside the first
    others_idle: list[int] = field(default_factory=list)  # bytes that others hold on them
    uuids: list[str] = field(default_factory=list)
    memory_bytes: int | None = None
    context_bytes: int = ASSUMED_CONTEXT_BYTES
    cannot: dict[str, str] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))  # as workers have it
    locks: Locks | None = None

    def baseline(self, number: int = 0) -> int:
        """Bytes in use on this of the `gpus` before a case, once the last worker's memory is free again."""
        gpu = self.gpus[number]
        if gpu is None:
            return 0
        deadline = time.monotonic() + SETTLE_S
        idle = int(self.facts.get("gpu_idle_bytes") or 0) if number == 0 else self.others_idle[number - 1]
        while (used := gpu.used_bytes()) is not None and used > idle + SETTLED_BYTES and time.monotonic() < deadline:
            time.sleep(0.01)
        return idle if used is None else used

    @property
    def spills(self) -> bool:
        """Whether the driver may put GPU memory into host memory, where another would say that there is no more."""
        return bool(self.facts.get("spills"))

    @property
    def gpus(self) -> list[nvml.Gpu | None]:
        """All that torch sees, in its order; None where NVML does not know one."""
        return [self.gpu, *self.others]

    def close(self) -> None:
        """End the workers, then let others have the GPU."""
        self.starter.close()
        if self.locks:
            self.locks.close()


def preload(models: Iterable[Model]) -> list[str]:
    """What the fork server imports: our worker tasks and the classes of these models."""
    names = ["pytest_vram.measure.simulation", "pytest_vram.measure.probes", "pytest_vram.measure.generation"]
    for model in models:
        names.append(f"diffusers:{model.pipeline}?")
        names.append(f"diffusers:{model.scheduler.class_name}?")
        names += [f"{component.library}:{component.class_name}?" for component in model.components.values()]
    return list(dict.fromkeys(names))


def start_machine(
    device: Device,
    models: Iterable[Model],
    *,
    allow_shared: bool,
    name_host: bool,
    say: Callable[[str], None],
    tell: Callable[[str], None] | None = None,
    gpus: int | None = None,
) -> Machine:
    """Start what `device` needs. `say` shows a passing line, `tell` (else `say`) one that stays.

    Of GPUs the first `gpus` are used, or all: they are locked before anything runs on them or beside them, until the
    machine is closed.

    Raises:
        UsageError: no GPU, a GPU in use by others, or libraries that cannot be imported.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
        raise UsageError("torch or diffusers is not installed: pip install torch diffusers transformers accelerate")
    tell = tell or say
    with contextlib.ExitStack() as started:
        locks = None
        if device == "cuda":
            _refuse_without_driver()
            locks = _locked(visible_gpus(gpus), started, tell)
        say("importing torch and diffusers")
        models = list(models)
        try:
            server = ForkServer(preload(models))
            started.callback(server.close)
            _check(models, server)
        except StartError as error:
            raise UsageError(str(error)) from error
        machine = Machine(device, server)
        if device == "cuda":
            try:
                machine = _on_gpus(server, name_host)
                if locks and not locks.cover(machine.uuids[:gpus]):  # CUDA counts them in another order
                    locks.close()
                    locks = _locked([gpu for gpu in machine.gpus[:gpus] if gpu], started, tell)
                    machine = _on_gpus(machine.starter, name_host)
                machine.locks = locks
                if not allow_shared:
                    _refuse_shared(machine.gpus[:gpus])
            except StartError as error:
                raise UsageError(f"--gpu: {error}") from error
        started.pop_all()
    return machine


def _locked(
    gpus: Sequence[nvml.Gpu] | None, started: contextlib.ExitStack, tell: Callable[[str], None]
) -> Locks | None:
    try:
        locks = lock_gpus(gpus, tell)
    except NotLocked as error:
        tell(f"the GPU is not locked, another sweep may start beside this one: {error}")
        return None
    started.callback(locks.close)
    return locks


def _on_gpus(starter: Starter, name_host: bool) -> Machine:
    """The machine as a canary found it: of this starter, or spawned where that cannot use CUDA.

    Raises:
        UsageError: where neither can.
    """
    machine = _with_gpu(starter, name_host)
    if machine is None and starter.name != "spawn":
        starter.close()
        machine = _with_gpu(Spawner(), name_host)
    if machine is None:
        raise UsageError("--gpu: a worker process could not use CUDA; `pytest-vram doctor` says what is missing")
    return machine


def _check(models: Sequence[Model], starter: Starter) -> None:
    """Raises UsageError where an architecture cannot be built."""
    if not models:
        return
    worker = starter.start(CHECK, PRELOAD_ENVIRON)
    try:
        worker.channel.send({"models": [model.model_dump(mode="json", by_alias=True) for model in models]})
        answer = worker.channel.receive(CHECK_TIMEOUT_S)
    except Closed:
        answer = {"problem": f"the architectures could not be checked: {worker.output_tail()[-300:]}"}
    finally:
        worker.kill()
    if answer is None or answer["problem"]:
        raise UsageError((answer or {}).get("problem") or f"the check of models took over {CHECK_TIMEOUT_S:g} s")


def _refuse_without_driver() -> None:
    """A quick no where there is plainly no GPU; in doubt the canary decides."""
    try:
        nvml.driver_version()
    except nvml.NvmlUnavailable as error:
        if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-ctrl", "/dev/kfd")):
            raise UsageError(
                f"--gpu: {error}; leave --gpu out for the estimate, or see `pytest-vram doctor`"
            ) from error


def _with_gpu(starter: Starter, name_host: bool) -> Machine | None:
    """The machine as the canary found it, or None where a worker of this starter cannot use CUDA."""
    worker = starter.start(CANARY, PRELOAD_ENVIRON)
    try:
        worker.channel.send({})
        answer = worker.channel.receive(CANARY_TIMEOUT_S)
        if answer is None or answer["event"] == "unavailable":
            if starter.name == "spawn" and answer:
                raise UsageError(f"--gpu: {answer['message']}; leave --gpu out for the estimate")
            return None
        machine = Machine("cuda", starter, memory_bytes=answer["memory_bytes"])
        machine.facts = {
            "gpu": answer["name"],
            "gpu_memory_bytes": answer["memory_bytes"],
            "gpu_uuid": hidden(answer["uuid"], name_host),
            "compute_capability": answer["capability"],
            "cuda": answer["cuda"],
            "cudnn": answer["cudnn"],
            "unified_memory": answer["integrated"],
        }
        with contextlib.suppress(nvml.NvmlUnavailable):
            machine.gpu = nvml.gpu_by_uuid(answer["uuid"])
        machine.uuids = answer["uuids"]
        machine.others = [_gpu(uuid) for uuid in machine.uuids[1:]]
        machine.others_idle = [(gpu.used_bytes() or 0) if gpu else 0 for gpu in machine.others]
        if spills := _spills(machine.gpu):
            machine.facts["spills"] = spills
        if machine.gpu is None:
            why = "NVML does not know this GPU"
            keys = ("memory.nvml_process_peak_bytes", "memory.nvml_device_peak_bytes")
            machine.cannot = dict.fromkeys((*keys, "energy_j_per_image", "telemetry"), why)
            return machine
        held = machine.gpu.processes().get(worker.pid)
        in_use = machine.gpu.used_bytes()
        with contextlib.suppress(nvml.NvmlUnavailable):
            machine.facts["driver"] = nvml.driver_version()
        machine.facts |= {
            "power_limit_w": machine.gpu.power_limit_w(),
            "mig": machine.gpu.mig() if machine.gpu.whole() is None else True,
        }
    except Closed:
        return None
    finally:
        worker.kill()
    idle = _idle_bytes(machine.gpu, worker.pid)
    machine.facts["gpu_idle_bytes"] = idle
    if not held and in_use is not None and idle is not None:  # NVML hides the worker or its bytes
        held = in_use - idle
    if held and held > answer["reserved_bytes"]:
        machine.context_bytes = held - answer["reserved_bytes"]
    return machine


def _spills(gpu: nvml.Gpu | None) -> str | None:
    """What of Windows, whose driver model may move GPU memory to the host, runs this GPU: `WSL`, `WDDM`, or None."""
    if "microsoft" in platform.release().lower():  # 5.15.153.1-microsoft-standard-WSL2
        return "WSL"
    return "WDDM" if gpu is not None and gpu.driver_model() == "WDDM" else None


def _gpu(uuid: str) -> nvml.Gpu | None:
    with contextlib.suppress(nvml.NvmlUnavailable):
        return nvml.gpu_by_uuid(uuid)
    return None


def _idle_bytes(gpu: nvml.Gpu, gone: int) -> int | None:
    """What the device holds once the driver has freed what the process `gone` held."""
    deadline = time.monotonic() + SETTLE_S
    last = gpu.used_bytes()
    while time.monotonic() < deadline:
        time.sleep(0.1)
        now = gpu.used_bytes()
        if gone not in gpu.processes() and now == last:
            break
        last = now
    return last


def _refuse_shared(gpus: Iterable[nvml.Gpu | None]) -> None:
    others: dict[int, int] = {}
    for gpu in filter(None, gpus):
        for pid, used in gpu.processes().items():
            others[pid] = others.get(pid, 0) + (used or 0)
    if others:
        held = sum(others.values()) / 2**30
        pids = ", ".join(str(pid) for pid in sorted(others))
        raise UsageError(
            f"--gpu: other processes use this GPU (pid {pids}, {held:.1f} GiB) and would be measured too: "
            "stop them, or give --vram-allow-shared"
        )

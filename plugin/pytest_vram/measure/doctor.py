"""What this machine has for measuring, what is missing, and the command that mends it."""

import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pytest_vram.measure import environment, nvml
from pytest_vram.measure.channel import Closed
from pytest_vram.measure.forkserver import PRELOAD_ENVIRON, Spawner
from pytest_vram.measure.machine import CANARY, CANARY_TIMEOUT_S

GIB = 1 << 30
MIN_PYTHON = (3, 11)
LITTLE_RAM_BYTES = 16 * GIB  # model offload of SDXL in fp16 holds 7 GB of weights and the libraries
LITTLE_DISK_BYTES = 20 * GIB  # the weights of SDXL in fp32 and fp16


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `missing` means that --gpu could not work; `mend` is the command that helps."""

    name: str
    verdict: Literal["ok", "note", "missing"]
    found: str
    mend: str = ""


def examine(results: Path) -> Iterator[Finding]:
    """Look at everything, quick things first."""
    yield _python()
    yield from _libraries()
    driver, gpus = _driver()
    cuda = list(_cuda(gpus))
    if cuda[0].verdict == "ok" and driver.verdict == "missing":  # Jetson, ROCm: it works, with less to see
        driver = replace(driver, verdict="note", mend="memory of the process and telemetry are not recorded")
    yield driver
    for number, gpu in enumerate(gpus):
        yield _gpu(number, gpu)
    yield from cuda
    yield from _host(results)


def _python() -> Finding:
    enough = sys.version_info >= MIN_PYTHON
    mend = "" if enough else "install Python 3.11 or newer, and make the virtual environment with it"
    return Finding("Python", "ok" if enough else "missing", platform.python_version(), mend)


def _libraries() -> Iterator[Finding]:
    for name, version in environment.versions().items():
        if version:
            yield Finding(name, "ok", version)
        else:
            yield Finding(name, "missing", "not installed", f"pip install {name}")


def _driver() -> tuple[Finding, list[nvml.Gpu]]:
    try:
        return Finding("NVIDIA driver", "ok", nvml.driver_version()), nvml.gpus()
    except nvml.NvmlUnavailable as error:
        mend = "install the NVIDIA driver; in a container, start it with the GPU (docker run --gpus all …)"
        return Finding("NVIDIA driver", "missing", str(error), mend), []


def _gpu(number: int, gpu: nvml.Gpu) -> Finding:
    total, used = gpu.total_bytes(), gpu.used_bytes()
    memory = (
        "memory unknown" if total is None or used is None else f"{total / GIB:.1f} GiB, {(total - used) / GIB:.1f} free"
    )
    others = gpu.processes()
    found = f"{gpu.name}, {memory}"
    if gpu.mig():
        found += ", MIG on"
    if others:
        pids = ", ".join(str(pid) for pid in sorted(others))
        return Finding(
            f"GPU {number}", "note", f"{found}; used by pid {pids}", "stop them, or give --vram-allow-shared"
        )
    return Finding(f"GPU {number}", "ok", found)


def _cuda(gpus: list[nvml.Gpu]) -> Iterator[Finding]:
    """Start a worker, as a measurement does, and see whether it gets CUDA and NVML sees it."""
    spawner = Spawner()
    worker = spawner.start(CANARY, PRELOAD_ENVIRON)
    try:
        worker.channel.send({})
        answer = worker.channel.receive(CANARY_TIMEOUT_S)
        visible = any(worker.pid in gpu.processes() for gpu in gpus)
    except Closed:
        lines = worker.output_tail().splitlines()
        answer, visible = {"event": "unavailable", "message": lines[-1] if lines else "the worker died"}, False
    finally:
        worker.kill()
        spawner.close()
    if answer is None or answer["event"] == "unavailable":
        message = answer["message"] if answer else f"no answer within {CANARY_TIMEOUT_S:g} s"
        mend = "see the driver above; is CUDA_VISIBLE_DEVICES set?"
        if "built for the CPU" in message:
            mend = "pip install --force-reinstall torch (a build for your CUDA; see pytorch.org)"
        yield Finding("CUDA in a worker", "missing", message, mend)
        return
    cuda = f"CUDA {answer['cuda']}, compute capability {answer['capability']}"
    yield Finding("CUDA in a worker", "ok", f"{answer['name']}: {cuda}")
    if visible:
        yield Finding("NVML process list", "ok", "shows the worker's pid")
    else:
        note = "does not show the worker's pid: the device's total less its idle baseline stands in for it"
        yield Finding("NVML process list", "note", note, "in a container: docker run --pid=host …")


def _host(results: Path) -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available
    enough = free >= LITTLE_RAM_BYTES
    mend = "" if enough else "offload and pretrained weights of large models need more"
    yield Finding("free host RAM", "ok" if enough else "note", f"{free / GIB:.1f} GiB", mend)
    folder = next(path for path in (results.absolute(), *results.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    enough = free >= LITTLE_DISK_BYTES
    yield Finding("free disk", "ok" if enough else "note", f"{free / GIB:.1f} GiB", "" if enough else "for weights")

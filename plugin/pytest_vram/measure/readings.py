"""What NVML's readings of a case are worth: a figure, or why there is none. A lie is no figure, and costs no record."""

from collections.abc import Sequence

from pytest_vram.measure.machine import Machine
from pytest_vram.measure.runs import WorkerRun
from pytest_vram.records.schema import NVML_SLACK_BYTES

STOPPED = "NVML stopped answering during the case"
NOT_LISTED = (
    "NVML lists no process with the worker's pid (so in some containers, under MIG and on WSL); "
    "nvml_device_peak_bytes is the device less its idle baseline"
)
TELEMETRY = ("sm_clock_mhz", "temperature_c", "power_w")
Figure = tuple[int | None, str]
"""Bytes, or None and the reason."""


def nvml_memory(
    machine: Machine, runs: Sequence[WorkerRun], reserved: int | None
) -> tuple[dict[str, int | None], dict[str, str]]:
    """The fields of a record's memory that NVML gives, and for those that are None the reasons. `reserved` is the peak
    of PyTorch's pool; bytes."""
    if machine.device == "cpu":
        return {}, {}
    every = [one for run in runs for one in (run, *run.peers)]
    found = {
        "nvml_process_peak_bytes": process_peak(machine, every, reserved),
        "nvml_device_peak_bytes": _device_peak(machine, every, reserved),
        "context_bytes": _context(machine, every),
    }
    figures = {name: figure for name, (figure, _) in found.items()}
    return figures, {f"memory.{name}": why for name, (_, why) in found.items() if why}


def process_peak(machine: Machine, every: Sequence[WorkerRun], reserved: int | None) -> Figure:
    """The most that the workers' processes held."""
    peak = max((run.sampler.process_peak or 0 for run in every), default=0)
    if not peak:
        return None, _silent(machine, every) or NOT_LISTED
    if any(run.done and run.sampler.process_peak and not run.sampler.process_now for run in every):
        return None, STOPPED
    return _believed(machine, peak, reserved)


def _device_peak(machine: Machine, every: Sequence[WorkerRun], reserved: int | None) -> Figure:
    """The most that was in use on a GPU, less what was before."""
    if why := _silent(machine, every):
        return None, why
    peak = max((run.sampler.device_peak or 0 for run in every), default=0)
    return _believed(machine, peak, reserved) if peak else (None, "NVML told no more memory in use than before")


def _believed(machine: Machine, peak: int, reserved: int | None) -> Figure:
    if machine.memory_bytes and peak > machine.memory_bytes and not machine.spills:
        return None, f"NVML's highest reading, {peak}, is more than the GPU has"
    if reserved is not None and peak + NVML_SLACK_BYTES < reserved:
        return None, (
            f"NVML's highest reading, {peak}, is below what PyTorch had reserved: the peak fell between two samples"
        )
    return peak, ""


def _context(machine: Machine, every: Sequence[WorkerRun]) -> Figure:
    context = max((run.context or 0 for run in every), default=0)
    if context and machine.memory_bytes and context > machine.memory_bytes:
        return None, f"what NVML tells beside PyTorch's pool, {context}, is more than the GPU has"
    if context:
        return context, ""
    if not all(run.done for run in every):
        return None, "the worker did not get so far"
    return None, _silent(machine, every) or "NVML told no more than what PyTorch's pool held"


def _silent(machine: Machine, every: Sequence[WorkerRun]) -> str:
    """Why NVML told nothing, or ""."""
    if all(run.sampler.gpu is None for run in every):
        return machine.cannot.get("memory.nvml_process_peak_bytes", "NVML was not sampled")
    if any(run.sampler.stopped for run in every):
        return STOPPED
    if not any(run.sampler.answered for run in every):
        shared = ": the GPU has none of its own" if machine.facts.get("unified_memory") else ""
        return f"NVML does not tell the memory in use{shared}"
    return ""


def untold(machine: Machine, runs: Sequence[WorkerRun]) -> dict[str, str]:
    """What telemetry lacks in every round, with the reason."""
    rounds = [state for run in runs for state in run.telemetry]
    if machine.device == "cpu" or not rounds:
        return {}
    why = "" if any(run.sampler.gpu for run in runs) else machine.cannot.get("telemetry", "NVML was not sampled")
    found = {
        f"telemetry.{name}": why or "NVML does not tell it"
        for name in TELEMETRY
        if all(getattr(state, name) is None for state in rounds)
    }
    if not any(run.sampler.throttle_known for run in runs):
        found["telemetry.throttle"] = why or "NVML does not tell it: throttled rounds were not seen"
    return found

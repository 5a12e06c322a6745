"""All records of all runs as one tidy DataFrame: a row a record, the unit in the column's name."""

import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_vram.cases.case import Case
from pytest_vram.records.reading import ReadRun, read_runs
from pytest_vram.records.schema import Memory, Phase, Record
from pytest_vram.report.choices import move_is_in_the_steps

if TYPE_CHECKING:
    import pandas as pd

PHASES: tuple[Phase, ...] = ("load", "compile", "encode", "denoise", "decode", "call")

TEXT, WHOLE, REAL, FLAG, WHEN = "string", "Int64", "Float64", "boolean", "datetime64[us, UTC]"

# name: (dtype, what it is). docs/tables.md has this table, and a test holds them together.
COLUMNS: dict[str, tuple[str, str]] = {
    "run": (TEXT, "the run file's name"),
    "started": (WHEN, "when the run began, UTC"),
    "gpu": (TEXT, "the GPU's name as PyTorch tells it; null where the run had none"),
    "gpu_memory_bytes": (WHOLE, "the GPU's memory as PyTorch sees it"),
    "driver": (TEXT, "the NVIDIA driver's version"),
    "torch": (TEXT, "PyTorch's version"),
    "diffusers": (TEXT, "diffusers' version"),
    "commit": (TEXT, "the commit that was measured"),
    "dirty": (FLAG, "whether tracked files differed from that commit"),
    "sweep": (TEXT, "the sweep's name"),
    "id": (TEXT, "the case's id, a label"),
    "method": (TEXT, "measured or estimated"),
    "status": (TEXT, "ok, oom, error, timeout or skipped"),
    "reason": (TEXT, "why it was skipped, or the failure's message"),
    "model": (TEXT, "the model's name; the test's file for a pipeline of one's own"),
    "test": (TEXT, "the test's name, for a pipeline of one's own"),
    "optimizations": (TEXT, "the set of optimizations, joined with +; empty for a pipeline of one's own"),
    "width": (WHOLE, "pixels"),
    "height": (WHOLE, "pixels"),
    "frames": (WHOLE, "frames of a video; null for images"),
    "batch_size": (WHOLE, "images (or videos) a call"),
    "steps": (WHOLE, "denoising steps that were run"),
    "guidance_scale": (REAL, "classifier-free guidance; 1 or less turns it off"),
    "sequence_length": (WHOLE, "tokens of the prompt"),
    "scheduler": (TEXT, "the scheduler's class"),
    "seed": (WHOLE, "the seed of weights and noise"),
    "weights": (TEXT, "random or pretrained"),
    "limit_bytes": (WHOLE, "the memory the program might have, context included; null for all of the GPU"),
    "weights_bytes": (WHOLE, "the networks' parameters and buffers"),
    "allocated_peak_bytes": (WHOLE, "peak of what tensors take"),
    "reserved_peak_bytes": (WHOLE, "peak of PyTorch's pool"),
    "nvml_process_peak_bytes": (WHOLE, "peak of the process in NVML, what nvidia-smi shows"),
    "nvml_device_peak_bytes": (WHOLE, "peak of the device in NVML, less what it held before"),
    "need_bytes": (WHOLE, "the smallest allocator cap under which a fresh process completes"),
    "need_tolerance_bytes": (WHOLE, "the width of the search's last bracket; the need is its upper end"),
    "context_bytes": (WHOLE, "what the process holds outside PyTorch's allocator"),
    "required_bytes": (WHOLE, "need + context; an estimate assumes 768 MiB of context"),
    "estimated_need_bytes": (WHOLE, "the need as simulated with no GPU"),
    "estimated_allocated_peak_bytes": (WHOLE, "the allocated peak as simulated"),
    "host_peak_bytes": (WHOLE, "peak of the process in host memory"),
    "alloc_retries": (WHOLE, "how often the allocator emptied its cache and asked again, with room"),
    "at_need_alloc_retries": (WHOLE, "the same in one call under a cap of the need"),
    "need_phase": (TEXT, "where a process with a little less than the need runs out of memory"),
    "cold_s": (REAL, "seconds of the first call in a process"),
    "median_s": (REAL, "seconds of a call, median over all rounds"),
    "step_s": (REAL, "seconds of one call of the denoiser, but for the first (in the first files of all)"),
    "first_step_s": (REAL, "seconds of the denoiser's first call, for which an offload moves its weights"),
    "images_per_s": (REAL, "images (or videos) a second"),
    "frame_s": (REAL, "seconds of a call for each frame of each video"),
    "at_need_s": (REAL, "seconds of the same call with no more memory than required"),
    "full_length_s": (REAL, "seconds of a call with the model's native number of steps, calculated"),
    "full_length_steps": (WHOLE, "that number of steps"),
    "denoiser_calls": (WHOLE, "calls of the denoiser in one call of the pipeline"),
    "gpu_lag_s": (REAL, "seconds by which the GPU was behind the host; near 0 the host's CPU decides the time"),
    "rounds": (WHOLE, "timed calls that count"),
    "rounds_discarded": (WHOLE, "timed calls thrown away and repeated, because the GPU throttled"),
    **{f"{phase}_s": (REAL, f"seconds of the phase {phase}") for phase in PHASES},
    **{f"{phase}_allocated_peak_bytes": (WHOLE, f"allocated peak in the phase {phase}") for phase in PHASES},
    "sm_clock_mhz": (REAL, "SM clock, median over the rounds"),
    "temperature_c": (REAL, "GPU temperature, highest of the rounds"),
    "power_w": (REAL, "power, mean over the rounds"),
    "energy_j_per_image": (REAL, "joules of one image (or video), from the GPU's own counter"),
    "no_effect": (TEXT, "the optimizations that were seen to change nothing, joined with +"),
    "exact": (FLAG, "where all flags claim it: whether the output equals that of the dtype alone, but for rounding"),
    "mean_abs_difference": (REAL, "mean difference of that output; values are from 0 to 1"),
    "max_abs_difference": (REAL, "largest difference of that output"),
    "psnr_db": (REAL, "PSNR against that output; null where nothing differs"),
    "leak_check_calls": (WHOLE, "calls of the leak check (--vram-leak-check)"),
    "allocated_bytes_per_call": (REAL, "how much what tensors take grew from call to call in one process"),
    "reserved_bytes_per_call": (REAL, "the same of PyTorch's pool"),
    "host_bytes_per_call": (REAL, "the same of the process's anonymous host memory"),
    "tensors_per_call": (REAL, "how many more tensors lived after each call"),
    "leaks": (TEXT, "which of these grew for certain, joined with +; empty where none did"),
    "disturbed": (TEXT, "what disturbed the measurement"),
    "failure_phase": (TEXT, "where it failed"),
    "wall_s": (REAL, "seconds that the case took, all in all"),
    "probes": (WHOLE, "fresh processes that the search for the need took"),
}

_ENVIRONMENT = ("gpu", "driver", "torch", "diffusers", "commit", "dirty")
_CALL = ("cold_s", "median_s", "step_s", "first_step_s", "images_per_s", "at_need_s")
_TIME = (*_CALL, "full_length_s", "full_length_steps")


def load(paths: str | Path | Iterable[str | Path]) -> "pd.DataFrame":
    """The records of run files, or of the run files in folders, as one DataFrame with the columns of `COLUMNS`.

    Bytes are `Int64`, seconds `Float64`, and what was not measured is `<NA>`, never 0. A record with impossible figures
    is left out, with a warning that names it.

    Raises:
        RunFileError: naming the file, where one cannot be read; where there is none.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    runs, notes = read_runs([Path(path) for path in given])
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return frame(runs)


def frame(runs: Sequence[ReadRun]) -> "pd.DataFrame":
    """The same from runs that are read already."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for run in runs:
        described = _described(run)
        rows += [{**described, **_row(record)} for record in run.records]
    columns = {name: _series([row.get(name) for row in rows], dtype, pd.Series) for name, (dtype, _) in COLUMNS.items()}
    return pd.DataFrame(columns)


def _series(values: list[Any], dtype: str, series: Callable[..., Any]) -> Any:
    import pandas as pd

    if dtype == WHEN:
        return series(pd.to_datetime(series(values, dtype="object"), utc=True, errors="coerce")).astype(dtype)
    return series(values, dtype=dtype)


def _described(run: ReadRun) -> dict[str, Any]:
    environment = run.run.environment
    described: dict[str, Any] = {"run": run.name, "sweep": run.run.sweep, "started": run.started}
    described["gpu_memory_bytes"] = run.gpu_memory_bytes
    for name in _ENVIRONMENT:
        value, dtype = environment.get(name), COLUMNS[name][0]
        kind = {TEXT: str, WHOLE: int, FLAG: bool}[dtype]
        described[name] = value if type(value) is kind else None  # whoever wrote the file, the column keeps its dtype
    return described


def _row(record: Record) -> dict[str, Any]:
    case, memory, time = record.case, record.memory, record.time
    rounds = record.telemetry.rounds
    row: dict[str, Any] = {
        **{name: value for name, value in case.model_dump().items() if name in COLUMNS},
        **{name: getattr(memory, name) for name in Memory.model_fields},
        **{name: getattr(time, name) for name in (*_TIME, "denoiser_calls", "gpu_lag_s")},
        "optimizations": "+".join(case.optimizations),
        "id": record.id,
        "method": record.method,
        "status": record.status,
        "reason": record.reason or (record.failure.message if record.failure else None),
        "need_phase": record.need_phase,
        "rounds_discarded": time.rounds_discarded if time.workers else None,
        "rounds": sum(len(worker.rounds_s) for worker in time.workers) or None,
        "sm_clock_mhz": _of(statistics.median, [r.sm_clock_mhz for r in rounds]),
        "temperature_c": _of(max, [r.temperature_c for r in rounds]),
        "power_w": _of(statistics.fmean, [r.power_w for r in rounds]),
        "energy_j_per_image": record.energy_j_per_image,
        "no_effect": "+".join(record.no_effect) or None,
        "exact": record.exact,
        "disturbed": record.disturbed,
        "failure_phase": record.failure.phase if record.failure else None,
        "wall_s": record.wall.total_s if record.wall else None,
        "probes": record.wall.probes if record.wall and record.method == "measured" else None,
    }
    if move_is_in_the_steps(record):
        row |= dict.fromkeys(("step_s", "at_need_s", "full_length_s", "full_length_steps"))
    if isinstance(case, Case) and case.frames and time.median_s is not None:
        row["frame_s"] = time.median_s / (case.batch_size * case.frames)
    for phase, cost in record.phases.items():
        row[f"{phase}_s"], row[f"{phase}_allocated_peak_bytes"] = cost.time_s, cost.allocated_peak_bytes
    if record.exactness:
        for name in ("mean_abs_difference", "max_abs_difference", "psnr_db"):
            row[name] = getattr(record.exactness, name)
    if record.drift:
        row |= record.drift.model_dump(exclude={"calls", "leaks"})
        row |= {"leak_check_calls": record.drift.calls, "leaks": "+".join(record.drift.leaks)}
    return row


def _of(statistic: Callable[[list[Any]], Any], values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    return float(statistic(known)) if known else None

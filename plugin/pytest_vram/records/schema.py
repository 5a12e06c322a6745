"""The schema of a record and of a run, checked when written and when read.

Bytes are bytes, times seconds; what could not be read is null, with its reason in `unavailable`, and never 0.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, computed_field, model_validator

from pytest_vram.cases.case import AnyCase, Name, OwnCase

SCHEMA = 1  # rises only when a meaning changes
# With expandable segments PyTorch asks for room for a whole segment, although it uses what is free of the pages at both
# ends of it (20 MiB each), and rounds it to 2 MiB: alloc_block in c10/cuda/CUDACachingAllocator.cpp. So a cap can be
# this much above what a process reserves.
EXPANDABLE_ASKS_BYTES = 42 << 20
NVML_SLACK_BYTES = 64 << 20  # NVML was seen to count a process up to this much below the pool it holds

# What a process holds outside PyTorch's allocator, where it is not known: 686 MiB for Stable Diffusion on an H100 with
# CUDA 13; it differs by card and driver, so a rounder, larger figure stands in for it.
ASSUMED_CONTEXT_BYTES = 768 << 20

# Half the distance between 1 and the next number; for fp32 that of TF32, in which GPUs compute its convolutions.
ROUNDOFF = {"fp32": 2**-11, "fp16": 2**-11, "bf16": 2**-8}
EXACT_WITHIN_ROUNDOFFS = 4  # of values from 0 to 1: in half precision half a level of an 8-bit image

# Why a record lacks something: nobody asked for it, or it was cut short, which a resumed sweep makes up for.
NOT_SEARCHED = "not searched (--vram-no-need)"
NOT_COMPARED = "not compared (--vram-no-difference)"
SEARCH_INTERRUPTED = "the search for the need was interrupted"
CHECK_INTERRUPTED = "the leak check was interrupted"
NOT_FOR_MEMORY = "it failed, but not for memory"

# What slows a GPU beyond its power cap, by the names that measure/nvml.py gives to NVML's reasons.
ABNORMAL = frozenset({"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"})

Status = Literal["ok", "oom", "error", "timeout", "skipped"]
# compile: the first call, where torch.compile was at work in it; call: of a pipeline with no such parts
Phase = Literal["load", "compile", "encode", "denoise", "decode", "call"]
Bytes = Annotated[int, Field(strict=True, gt=0, lt=1 << 50)]
Seconds = Annotated[float, Field(gt=0, lt=1e7, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 50)]
Slope = Annotated[float, Field(gt=-(1 << 50), lt=1 << 50, allow_inf_nan=False)]
Leak = Literal["allocated", "reserved", "tensors", "host"]
Text = Annotated[str, Field(max_length=20_000)]


class _Part(BaseModel):
    """Unknown keys are ignored: a newer writer may know more."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Memory(_Part):
    """Bytes. `*_peak` is the most ever held; need and required are defined in docs/architecture.md.

    Where a case takes several GPUs these are the highest of any of them; but `weights_bytes` is of all networks, also
    of those that are in host memory, on another GPU, or dropped on the way: there it may be above the peaks.

    `alloc_retries` is how often the allocator emptied its cache and asked again: in all calls with room, and
    `at_need_alloc_retries` in the second call under a cap of the need.
    """

    weights_bytes: Bytes | None = None
    allocated_peak_bytes: Bytes | None = None
    reserved_peak_bytes: Bytes | None = None
    nvml_process_peak_bytes: Bytes | None = None
    nvml_device_peak_bytes: Bytes | None = None
    need_bytes: Bytes | None = None
    need_tolerance_bytes: Bytes | None = None
    context_bytes: Bytes | None = None
    required_bytes: Bytes | None = None
    estimated_need_bytes: Bytes | None = None
    estimated_allocated_peak_bytes: Bytes | None = None
    host_peak_bytes: Bytes | None = None
    alloc_retries: Count | None = None
    at_need_alloc_retries: Count | None = None


class GpuMemory(_Part):
    """Bytes on one of the GPUs that a case takes."""

    allocated_peak_bytes: Bytes | None = None
    reserved_peak_bytes: Bytes | None = None
    nvml_process_peak_bytes: Bytes | None = None
    context_bytes: Bytes | None = None
    need_bytes: Bytes | None = None
    required_bytes: Bytes | None = None
    estimated_need_bytes: Bytes | None = None


class PhaseCost(_Part):
    """One phase: its seconds (the median of the rounds; load and compile happen once) and its allocated peak.

    Of `compile` the seconds are those that torch.compile itself took, with an empty cache, and the peak is that of all
    of the call that it was in; the peaks of `encode`, `denoise` and `decode` are then those of later calls.
    """

    time_s: float | None = Field(default=None, ge=0, lt=1e7)
    allocated_peak_bytes: Bytes | None = None


class WorkerTime(_Part):
    """The rounds of one fresh worker, in seconds."""

    rounds_s: list[Seconds] = Field(min_length=1)
    median_s: Seconds


class Time(_Part):
    """Seconds of one call, prompt to pixels. `step_s` is one call of the denoiser but for the first, `first_step_s`
    that one: an offload moves its weights for it. Files without `first_step_s` have the mean over all of them as
    `step_s`. `full_length_s` is calculated: the call, with as many steps more or less as the model's native number asks
    for. So is `at_need_s`, the same call as `median_s` under a cap of the need, from a warm second call of two steps.
    Where an offloaded denoiser ran but once a step is not known, nor a call of any other length.

    `gpu_lag_s` is how far the GPU was behind the host when that had queued the denoiser's last call (without a
    denoiser: all of the call). Near 0 the GPU waits for the host's CPU, which then decides the time."""

    cold_s: Seconds | None = None
    median_s: Seconds | None = None
    step_s: Seconds | None = None
    first_step_s: Seconds | None = None
    images_per_s: float | None = Field(default=None, gt=0)
    at_need_s: Seconds | None = None
    full_length_s: Seconds | None = None
    full_length_steps: Count | None = None
    denoiser_calls: Count | None = None
    gpu_lag_s: float | None = Field(default=None, ge=0, lt=1e7)
    workers: list[WorkerTime] = []
    rounds_discarded: Count = 0


class RoundTelemetry(_Part):
    """The GPU's state during one round; None where it could not be read."""

    sm_clock_mhz: Count | None = None
    temperature_c: int | None = Field(default=None, gt=-1000, lt=1000)
    power_w: float | None = Field(default=None, ge=0)
    throttle: list[Name] = []


class Telemetry(_Part):
    """The GPU's state, round by round."""

    rounds: list[RoundTelemetry] = []


class Failure(_Part):
    """Where a case ended, and why."""

    phase: Phase | None = None
    requested_bytes: Bytes | None = None
    limit_bytes: Bytes | None = None
    message: Text
    output_tail: Text = ""


class Exactness(_Part):
    """The decoded output against that of the case `against`, same seed: values are from 0 to 1, PSNR is in dB and null
    where nothing differs. `claimed`: all flags of the case claim to leave the image as it is."""

    claimed: bool = True
    against: str = Field(min_length=1, max_length=500)
    max_abs_difference: float = Field(ge=0, le=1)
    mean_abs_difference: float = Field(ge=0, le=1)
    psnr_db: float | None = Field(default=None, ge=0)


class Drift(_Part):
    """What grew from call to call in one process (`--vram-leak-check`): after two warm calls, `calls` more. Figures are
    Theil-Sen slopes, negative where memory came back, and null where it is not counted.

    Of several GPUs in one process bytes are those of all together; where each has a process of its own, those of the
    first. `host` is resident memory backed by no file, `tensors` how many PyTorch tensors live. In `leaks` is what grew
    for certain: the lower end of the slope's 95 % interval is above 0; of `host` above 256 KiB, and 4 MiB in all.
    """

    calls: Count
    allocated_bytes_per_call: Slope | None = None
    reserved_bytes_per_call: Slope | None = None
    host_bytes_per_call: Slope | None = None
    tensors_per_call: Slope | None = None
    leaks: list[Leak] = Field(default=[], max_length=4)


class Wall(_Part):
    """Where the wall time of a case went, in seconds."""

    total_s: float = Field(ge=0)
    load_s: float = Field(default=0, ge=0)
    warmup_s: float = Field(default=0, ge=0)
    rounds_s: float = Field(default=0, ge=0)
    need_s: float = Field(default=0, ge=0)
    probes: Count = 0


class Record(_Part):
    """Everything found about one case."""

    id: str = Field(min_length=1, max_length=500)
    case: AnyCase
    status: Status
    reason: Text | None = None
    method: Literal["measured", "estimated"]
    memory: Memory = Memory()
    gpus: list[GpuMemory] = Field(default=[], max_length=1024)  # empty where it takes one
    phases: dict[Phase, PhaseCost] = {}
    need_phase: Phase | None = None  # where a process with a little less than the need runs out of memory
    time: Time = Time()
    energy_j_per_image: float | None = Field(default=None, gt=0)
    telemetry: Telemetry = Telemetry()
    effects: dict[Name, Literal["applied", "no_effect"]] = {}
    exactness: Exactness | None = None
    drift: Drift | None = None
    disturbed: Text | None = None
    unavailable: dict[Name, Text] = {}
    failure: Failure | None = None
    wall: Wall | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def exact(self) -> bool | None:
        """Whether the output's mean difference is one that rounding in the dtype explains; None where it was not
        compared, or a flag claims no such thing."""
        if self.exactness is None or not self.exactness.claimed:
            return None
        roundoff = next((ROUNDOFF[name] for name in self.case.optimizations if name in ROUNDOFF), ROUNDOFF["bf16"])
        return self.exactness.mean_abs_difference <= EXACT_WITHIN_ROUNDOFFS * roundoff

    @property
    def no_effect(self) -> tuple[str, ...]:
        """The flags that were seen to change nothing. One alone that changed the image has had an effect, though it was
        not seen where it is looked for."""
        idle = tuple(name for name, effect in self.effects.items() if effect == "no_effect")
        flags = tuple(name for name in self.case.optimizations if name not in ROUNDOFF)  # without the dtype
        changed = self.exactness is not None and self.exactness.max_abs_difference > 0
        return () if changed and idle == flags and len(flags) == 1 else idle

    @model_validator(mode="after")
    def _possible(self) -> "Record":
        if problem := impossible_figures(self):
            raise ValueError(problem)
        return self


def _writable(environment: dict[str, Any]) -> dict[str, Any]:
    """With `?` in place of what no file can hold: half a surrogate pair."""
    text = json.dumps(environment, ensure_ascii=False).encode("utf-8", "replace")
    written: dict[str, Any] = json.loads(text)
    return written


class Run(_Part):
    """The records of one sweep with one environment: the key `vram` of a run file."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    environment: Annotated[dict[str, Any], AfterValidator(_writable)]
    sweep: Text
    complete: bool = True
    wall_s: float | None = Field(default=None, ge=0, lt=1e9, allow_inf_nan=False)  # of the session that wrote it
    aliases: dict[Text, list[Text]] = {}
    options: dict[str, Any] = {}
    records: list[Record] = []

    model_config = ConfigDict(extra="ignore", populate_by_name=True)


def impossible_figures(record: Record) -> str | None:
    """What in this record cannot be true, or None.

    A null is not a figure. Estimates model no NVML, and offloaded weights are not on the GPU.
    """
    memory = record.memory
    own = isinstance(record.case, OwnCase)  # which may offload, and expand segments, unseen
    offloaded = own or any(
        "offload" in name or "encoders" in name or "device_map" in name for name in record.case.optimizations
    )
    tolerance = memory.need_tolerance_bytes or 0
    order = [
        ("weights_bytes", None if offloaded else memory.weights_bytes, "allocated_peak_bytes", 0),
        ("allocated_peak_bytes", memory.allocated_peak_bytes, "reserved_peak_bytes", 0),
        ("reserved_peak_bytes", memory.reserved_peak_bytes, "nvml_process_peak_bytes", NVML_SLACK_BYTES),
    ]
    if record.status in ("ok", "oom"):
        for name, low, above, slack in order:
            high = getattr(memory, above)
            if record.status == "oom" and name == "weights_bytes":
                continue  # the weights may be what did not fit
            if low is not None and high is not None and low > high + slack:
                return f"{name} {low} is above {above} {high}"
        need, reserved = memory.need_bytes, memory.reserved_peak_bytes
        asks = EXPANDABLE_ASKS_BYTES if own or "expandable_segments" in record.case.optimizations else 0
        if record.method == "measured" and need and reserved and need > reserved + asks + tolerance:
            return f"need_bytes {need} is above reserved_peak_bytes {reserved} and its tolerance"
    if record.status == "ok" and record.method == "measured" and not record.time.workers:
        return "status ok with no rounds"
    if record.status in ("error", "timeout", "oom") and record.method == "measured" and record.failure is None:
        return f"status {record.status} with no failure"
    if record.status == "skipped" and not record.reason:
        return "status skipped with no reason"
    return None


def above_the_card(record: Record, card_bytes: int) -> str | None:
    """The first figure of this record that the GPU could not hold, or None."""
    for name, value in record.memory.model_dump().items():
        on_the_gpu = name.endswith("bytes") and not name.startswith(("host", "weights", "estimated"))
        if on_the_gpu and value is not None and value > card_bytes:
            return f"{name} {value} is more than the GPU has ({card_bytes})"
    return None

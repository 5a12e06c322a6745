"""The terminal's summary of a run: a row a case, at most 100 columns."""

from collections.abc import Iterable, Mapping
from io import StringIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pytest_vram.cases.case import Case
from pytest_vram.errors import printable
from pytest_vram.records.schema import ASSUMED_CONTEXT_BYTES, Drift, Phase, Record
from pytest_vram.report.text import display_name, gib, seconds

WIDTH = 100


def legend() -> str:
    """What the columns of the summary are."""
    assumed = f"{ASSUMED_CONTEXT_BYTES >> 20} MiB"
    return f"""\
GiB, s. required: the free memory a card must have, need + context; ~ is estimated: the simulated
need, and the context that was measured, or {assumed}. alloc.: peak of tensors. reserv.: peak of
PyTorch's pool. NVML: peak of the process, as nvidia-smi shows it. call s: one call, median.
at need: the same call with no more memory than required. full s: a call of the model's native
steps, calculated. img/s: images (of videos, frames) a second."""


def required(record: Record) -> str:
    """The required memory, or its estimate marked as one."""
    memory = record.memory
    if record.method == "measured" and memory.required_bytes is not None:
        return gib(memory.required_bytes)
    if memory.estimated_need_bytes is not None:
        return f"~{gib(memory.estimated_need_bytes + (memory.context_bytes or ASSUMED_CONTEXT_BYTES))}"
    return "–"


def drift(found: Drift) -> str:
    """What a leak check found, in one line."""
    if not found.leaks:
        return f"no leak in {found.calls} calls"
    said = []
    for kind in found.leaks:
        if kind == "tensors":
            said.append(f"{found.tensors_per_call or 0:+.3g} tensors")
        else:
            said.append(f"{kind} {(getattr(found, f'{kind}_bytes_per_call') or 0) / 2**20:+.3g} MiB")
    return f"LEAKS, each call: {', '.join(said)} ({found.calls} calls)"


def deciding_phase(record: Record) -> Phase | None:
    """The phase that ran out of memory just below the need; else the one with the highest allocated peak."""
    peaks = {name: cost.allocated_peak_bytes for name, cost in record.phases.items() if cost.allocated_peak_bytes}
    highest = max(peaks.items(), key=lambda peak: peak[1])[0] if peaks else None
    return record.need_phase or highest


def above_limit(record: Record, limit: int) -> str | None:
    """Why this case is not known to fit into `limit` bytes, or None where it fits."""
    problem = _above_limit(record, limit)
    return None if problem is None else printable(problem)


def _above_limit(record: Record, limit: int) -> str | None:
    memory, phase = record.memory, deciding_phase(record)
    at_most = f"max_required is {gib(limit)} GiB"
    if record.status == "oom":
        where = f" in {record.failure.phase}" if record.failure and record.failure.phase else ""
        return f"{record.id}: out of memory{where}; {at_most}"
    if memory.required_bytes is None:
        why = record.unavailable.get("memory.required_bytes", "it was not measured")
        return f"{record.id}: the required memory is not known ({why}); {at_most}"
    if memory.required_bytes <= limit:
        return None
    context = memory.required_bytes - (memory.need_bytes or 0)
    parts = f"need {gib(memory.need_bytes)} + context {gib(context)}"
    decides = f"; {phase} decides" if phase else ""
    return f"{record.id}: required {gib(memory.required_bytes)} GiB ({parts}); {at_most}{decides}"


def summary(records: Iterable[Record], aliases: Mapping[str, Iterable[str]]) -> str:
    """The table, without colours; `~` marks an estimate."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    table.add_column("case", overflow="fold", ratio=1)
    table.add_column("status", no_wrap=True)
    for heading in ("required", "alloc.", "reserv.", "NVML", "call s", "at need", "full s", "img/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_model: dict[str, list[Record]] = {}
    for record in records:
        by_model.setdefault(record.case.model, []).append(record)
    for model, group in by_model.items():
        table.add_row(escape(printable(display_name(model, aliases))))
        for record in group:
            table.add_row(*_row(record))
    console = Console(file=StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in str(text).splitlines())


def _row(record: Record) -> list[str]:
    memory, time = record.memory, record.time
    label = printable(" ".join(record.case.labels))
    frames = record.case.frames if isinstance(record.case, Case) else None
    if record.no_effect:
        label += f"\n   {printable(', '.join(record.no_effect))}: no effect"
    if record.exactness is not None and not record.exact and record.exactness.mean_abs_difference:
        what = "not exact" if record.exactness.claimed else "the image"
        label += f"\n   {what}: differs by {record.exactness.mean_abs_difference:.2g}"
    if record.drift is not None:
        label += f"\n   {drift(record.drift)}"
    elif "drift" in record.unavailable:
        label += f"\n   no leak check: {printable(record.unavailable['drift'])[:200]}"
    if record.disturbed:
        label += f"\n   disturbed: {printable(record.disturbed)}"
    if record.gpus:
        each = (f"{gib(gpu.required_bytes)}" for gpu in record.gpus)
        label += f"\n   {len(record.gpus)} GPUs: {', '.join(each)}"
    return [
        escape(f" {label}"),
        record.status if record.method == "measured" or record.status != "ok" else "estim.",
        required(record),
        gib(memory.allocated_peak_bytes),
        gib(memory.reserved_peak_bytes),
        gib(memory.nvml_process_peak_bytes),
        seconds(time.median_s),
        seconds(time.at_need_s),
        seconds(time.full_length_s),
        "–" if time.images_per_s is None else f"{time.images_per_s * (frames or 1):.2f}",
    ]


def properties(record: Record) -> dict[str, str]:
    """The figures of a case for JUnit: bytes and seconds; what is not known is left out."""
    memory, time = record.memory, record.time
    found = {
        "vram.status": record.status,
        "vram.method": record.method,
        "vram.required_bytes": memory.required_bytes,
        "vram.need_bytes": memory.need_bytes,
        "vram.allocated_peak_bytes": memory.allocated_peak_bytes,
        "vram.nvml_process_peak_bytes": memory.nvml_process_peak_bytes,
        "vram.median_s": time.median_s,
        "vram.leaks": None if record.drift is None else ",".join(record.drift.leaks) or "none",
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def line(record: Record) -> str:
    """One case in one line, for the progress."""
    said = {
        "ok": "estimated" if record.method == "estimated" else "ok",
        "oom": "out of memory",
        "skipped": f"skipped: {record.reason}",
    }.get(record.status, record.status)
    parts = [f"{record.id}: {said}"]
    if record.status == "ok":
        if (needed := required(record)) != "–":
            parts.append(f"{needed} GiB required")
        if record.memory.reserved_peak_bytes:
            parts.append(f"{gib(record.memory.reserved_peak_bytes)} reserved")
        if record.time.median_s is not None:
            parts.append(f"{seconds(record.time.median_s)} s")
        if record.drift is not None:
            parts.append(drift(record.drift))
    return printable(", ".join(parts))


def where_time_went(records: Iterable[Record], wall_s: float, gpus: int = 1) -> str:
    """How much of the wall time was measurement, of so many GPUs at a time."""
    walls = [record.wall for record in records if record.wall and record.method == "measured"]
    parts = ("load", "warmup", "rounds", "need")
    load, warmup, rounds, need = (sum(getattr(wall, f"{part}_s") for wall in walls) for part in parts)
    share = (load + warmup + rounds + need) / (gpus * wall_s) if wall_s else 0.0
    each = f" on {gpus} GPUs" if gpus > 1 else ""
    return (
        f"{wall_s:.0f} s of wall time{each}, {share:.0%} of it measurement: "
        f"load {load:.0f} s, warm-up {warmup:.0f} s, rounds {rounds:.0f} s, need {need:.0f} s"
    )

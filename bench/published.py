"""Writes docs/models.md from the runs in results/: python bench/published.py

What the models of this repository take, held against what others have published, and against our own estimates.
published.csv has what was measured by a named method: torch.cuda.max_memory_allocated, no compilation, half precision.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import read_models
from pytest_vram.records.reading import ReadRun, read_runs
from pytest_vram.records.schema import Record
from pytest_vram.report.choices import move_is_in_the_steps
from pytest_vram.report.document import Cell, Table
from pytest_vram.report.render import table_lines
from pytest_vram.report.text import gib

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "models.md"
GIB = 1 << 30
FAR = 0.05  # an estimate that is further off is named
MOST = 12
FLAG = "+expandable_segments"

TEXT = """\
# The models, held against others and against the estimate

Made from the runs in `results/` by `python bench/published.py`. Weights are random; memory depends on shapes, dtypes
and code. GiB, unless said otherwise.

## Against published peaks

The peak of allocated memory, as `torch.cuda.max_memory_allocated` gives it; ours measured on {gpus}, and estimated.

{published}

Where weights and denoiser decide, the ratio is 1: FLUX.1-dev differs by at most {flux} %. One image of 28 steps by it
took the first of these sources 6.57 s, with the releases of its time, and {flux_s} here, on {flux_gpu}.

## Against the estimate

{count} cases of all models have both a measured need and an estimate: median error {median} %, {within} % of them
within 5 %. Those further off:

{far}

Where that was looked into (SDXL), a tensor fits into a hole of the allocator's pool in one process and not in the
other. The allocated peak, which has no such luck in it, is estimated within {allocated} %. These are the estimates that
each run made. Those before 29 November 2026 gave T5's attention a fused kernel, which PyTorch 2.11 does not find for
it, and attention without one no mask of its scores; those of commit 72f9c8e and before gave one pool of memory to
what the streams of several networks copy, where PyTorch has one for each. `python bench/estimates.py` holds the
simulation of today against all of them.

## Expandable segments

`expandable_segments` ends fragmentation. Measured, with and without:

{measured}

*at need*: seconds of a call with no more memory than required, where both took as many steps. Estimated, for each model
at its native size, those that gain most:

{estimated}

## Videos

Required GiB, and seconds: of a call with the model's own number of steps, and of that for each frame.

{videos}
"""

Key = tuple[str, str, int, int, int | None, int]


def key(case: Case) -> Key:
    """Model, optimizations, width, height, frames, batch size: what is shown in one row."""
    return case.model, "+".join(case.optimizations), case.width, case.height, case.frames, case.batch_size


def table(columns: Sequence[str], rows: Iterable[tuple[Key, Sequence[str]]]) -> str:
    """A table in Markdown: a case in each row."""
    lines = []
    for (model, optimizations, width, height, frames, batch_size), texts in rows:
        size = f"{width}x{height}" + (f", {frames} frames" if frames else "")
        lines.append([Cell(model), Cell("", name=optimizations), Cell(size), Cell(str(batch_size)), *map(Cell, texts)])
    return table_lines(Table("", ["model", "set", "size", "batch", *columns], lines, 4))


def published(ours: dict[Key, Record], estimated: dict[Key, Record]) -> tuple[str, float]:
    """The table, and how far FLUX.1-dev is off at most."""
    rows: list[tuple[Key, list[str]]] = []
    flux = 0.0
    with (HERE / "published.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            width, height, batch_size = (int(row[name]) for name in ("width", "height", "batch_size"))
            frames = int(row["frames"]) if row["frames"] else None
            case: Key = row["model"], row["optimizations"], width, height, frames, batch_size
            theirs, cells = float(row["allocated_gib"]), []
            for records in (ours, estimated):
                peak = records[case].memory.allocated_peak_bytes if case in records else None
                cells += ["–", "–"] if peak is None else [gib(peak), f"{peak / GIB / theirs:.3f}"]
                if peak and records is ours and case[0] == "flux1-dev":
                    flux = max(flux, abs(peak / GIB / theirs - 1))
            source = row["source"].split(":")[0].split("@")[0]
            rows.append((case, [f"{theirs:.2f}", row["gpu"], *cells, row["made_of"] or "–", source]))
    head = ["theirs", "on", "measured", "ratio", "estimated", "ratio", "the difference is made of", "source"]
    return table(head, rows), flux


def with_and_without(records: dict[Key, Record]) -> list[tuple[Key, Record, Record]]:
    """Cases that are there without and with expandable segments."""
    found = []
    for (model, optimizations, *rest), record in records.items():
        old = (model, optimizations.removesuffix(FLAG), *rest)
        if optimizations.endswith(FLAG) and old in records:
            found.append((old, records[old], record))
    return sorted(found, key=lambda pair: -(pair[1].memory.need_bytes or 0) + (pair[2].memory.need_bytes or 0))


class Records(NamedTuple):
    """The newest of each case: measured, and on which GPU, measured with a need, and estimated."""

    measured: dict[Key, Record]
    gpus: dict[Key, str]
    needs: dict[Key, Record]
    estimated: dict[Key, Record]


def gather(runs: Iterable[ReadRun]) -> Records:
    """The cases that completed with no limit; runs come oldest first."""
    found = Records({}, {}, {}, {})
    for gpu, record in ((run.gpu, record) for run in runs for record in run.records):
        case = record.case
        if record.status != "ok" or not isinstance(case, Case) or case.limit_bytes is not None:
            continue
        if record.method == "estimated":
            found.estimated[key(case)] = record
            continue
        found.measured[key(case)] = record
        found.gpus[key(case)] = gpu or ""
        if record.memory.need_bytes:
            found.needs[key(case)] = record
    return found


def against_estimate(needs: dict[Key, Record]) -> dict[str, Any]:
    """How far the estimates are off."""
    errors: dict[Key, float] = {}
    allocated = 0.0
    for case, record in needs.items():
        memory = record.memory
        if memory.estimated_need_bytes and memory.estimated_allocated_peak_bytes and memory.allocated_peak_bytes:
            errors[case] = memory.estimated_need_bytes / (memory.need_bytes or 1) - 1
            allocated = max(allocated, abs(memory.estimated_allocated_peak_bytes / memory.allocated_peak_bytes - 1))
    far = [
        (k, [gib(needs[k].memory.need_bytes), gib(needs[k].memory.estimated_need_bytes), f"{100 * e:+.1f} %"])
        for k, e in sorted(errors.items(), key=lambda item: -abs(item[1]))
        if abs(e) > FAR
    ]
    return {
        "count": len(errors),
        "median": f"{100 * median(map(abs, errors.values())):.2f}",
        "within": f"{100 * sum(abs(e) <= FAR for e in errors.values()) / len(errors):.0f}",
        "far": table(["need", "estimated", "error"], far),
        "allocated": f"{100 * allocated:.2f}",
    }


def expandable(found: Records) -> dict[str, str]:
    """What expandable segments save."""
    pairs = [
        (k, [gib(old.memory.required_bytes), gib(new.memory.required_bytes), at_need(old, new)])
        for k, old, new in with_and_without(found.needs)
    ]
    native = {name: (m.native.width, m.native.height, m.native.frames, 1) for name, m in read_models().items()}
    gains = [
        (k, [gib(old.memory.need_bytes), gib(new.memory.need_bytes), f"−{100 * saved(old, new):.0f} %"])
        for k, old, new in with_and_without(found.estimated)
        if k[2:] == native.get(k[0])
    ]
    return {
        "measured": table(["required", "with it", "at need, s"], pairs),
        "estimated": table(["need", "with it", "saved"], gains[:MOST]),
    }


def videos(found: Records) -> str:
    """The measured videos."""
    rows = []
    for k, record in sorted(found.measured.items(), key=lambda item: (*item[0][:4], item[0][4] or 0)):
        if frames := k[4]:
            required = gib(found.needs[k].memory.required_bytes) if k in found.needs else "–"
            full_s = None if move_is_in_the_steps(record) else record.time.full_length_s
            peaks = (gib(record.phases[name].allocated_peak_bytes) for name in ("encode", "denoise", "decode"))
            seconds = [f"{full_s:.1f}", f"{full_s / frames:.2f}"] if full_s else ["–", "–"]
            rows.append((k, [required, *seconds, found.gpus[k], " / ".join(peaks)]))
    return table(["required", "s", "s a frame", "on", "allocated: encode / denoise / decode"], rows)


def page(results: Path) -> str:
    """The page, from the runs of a folder."""
    runs, _ = read_runs([results])
    found = gather(runs)
    compared, flux = published(found.measured, found.estimated)
    one: Key = "flux1-dev", "bf16", 1024, 1024, None, 1
    return TEXT.format(
        gpus=", ".join(sorted({run.gpu for run in runs if run.gpu})),
        published=compared,
        flux=f"{100 * flux:.1f}",
        flux_s=f"{found.measured[one].time.full_length_s:.2f} s",
        flux_gpu=found.gpus[one],
        videos=videos(found),
        **against_estimate(found.needs),
        **expandable(found),
    )


def at_need(old: Record, new: Record) -> str:
    """The two times of a call at need, where both took as many steps."""
    assert isinstance(old.case, Case)
    assert isinstance(new.case, Case)
    if old.case.steps != new.case.steps or move_is_in_the_steps(old) or move_is_in_the_steps(new):
        return "–"
    return f"{old.time.at_need_s or 0:.2f} → {new.time.at_need_s or 0:.2f}"


def saved(old: Record, new: Record) -> float:
    """The share of the need that is gone."""
    return 1 - (new.memory.need_bytes or 0) / (old.memory.need_bytes or 1)


if __name__ == "__main__":
    PAGE.write_text(page(HERE.parent / "results"), encoding="utf-8")
    print(PAGE)

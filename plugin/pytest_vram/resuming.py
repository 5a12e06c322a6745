"""Going on with a sweep that did not end: which run, and which of its records stay."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pytest_vram.cases.case import AnyCase
from pytest_vram.cases.shard import Shard
from pytest_vram.errors import UsageError
from pytest_vram.measure.drift import CHECK_INTERRUPTED
from pytest_vram.measure.measurement import SEARCH_INTERRUPTED
from pytest_vram.planning import Plan
from pytest_vram.records.files import unfinished
from pytest_vram.records.schema import Record, Run

SAME_TO_RESUME = ("gpu", "driver", "torch", "cuda", "diffusers", "transformers", "accelerate", "commit", "dirty")
DONE = ("ok", "oom", "skipped")  # a resumed sweep tries everything else again


def newest_unfinished(folder: Path, shard: Shard | None) -> tuple[Path, Run] | None:
    """The newest unfinished run of this folder, and its file: of this shard, if there is one."""
    found = list(unfinished(folder))
    name = str(shard) if shard else None
    return next((one for one in found if _shard(one[1]) == name), next(iter(found), None))


def resumable(folder: Path, run: Run, shard: Shard | None, plans: Iterable[Plan]) -> tuple[Path, list[Record]]:
    """The newest unfinished run of this folder, and its records that need not be made again."""
    found, old = newest_unfinished(folder, shard) or (None, run)
    if found is None:
        raise UsageError(f"--vram-resume: no unfinished run in {folder}; leave it out to start a new one")
    if (other := _shard(old)) != _shard(run):
        what = f"shard {other}; give --vram-shard {other}, or" if other else "no shard;"
        raise UsageError(f"--vram-resume: {found} is {what} leave --vram-resume out to start a new run")
    for key in SAME_TO_RESUME:
        if old.environment.get(key) != run.environment.get(key):
            raise UsageError(
                f"--vram-resume: {found} was made with {key} {old.environment.get(key)}, "
                f"this is {run.environment.get(key)}; leave --vram-resume out to start a new run"
            )
    if old.sweep != run.sweep:
        raise UsageError(f"--vram-resume: {found} is of the sweep {old.sweep!r}; give --vram-sweep {old.sweep}")
    if old.options.get("cases") != run.options.get("cases"):
        raise UsageError(f"--vram-resume: {found} is a shard of other cases; give the same options")
    planned = {plan.case.id: plan.case for plan in plans}
    for record in old.records:
        if planned.get(record.id, record.case) != record.case:
            raise UsageError(
                f"--vram-resume: {found} measured {record.id} with other steps or weights; give the same options"
            )
    return found.with_suffix(".json"), [record for record in old.records if is_done(record)]


def known(records: Mapping[str, Record], case: AnyCase) -> Record | None:
    """The record of this very case, where it need not be made again."""
    record = records.get(case.id)
    return record if record is not None and record.case == case and is_done(record) else None


def is_done(record: Record) -> bool:
    """Whether a resumed sweep need not measure this case again."""
    interrupted = record.unavailable.get("memory.need_bytes") == SEARCH_INTERRUPTED
    return record.status in DONE and not interrupted and record.unavailable.get("drift") != CHECK_INTERRUPTED


def _shard(run: Run) -> Any:
    """The shard that a run says it is, or None."""
    return run.options.get("shard")

"""Several runs of one sweep as one: its shards, or what GPUs of one kind measured side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_vram.cases.shard import Shard
from pytest_vram.errors import RunFileError, UsageError
from pytest_vram.records.files import best_records
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import Record, Run

# compare/keys.py says of most of these that runs which differ in them are not comparable; records of other software are
# no records of one run either.
ENVIRONMENT = (
    "commit",
    "dirty",
    "gpu",
    "gpu_memory_bytes",
    "mig",
    "power_limit_w",
    "driver",  # its branch
    "cuda",
    "cudnn",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "pytest-vram",
    "python",
    "start",
    "variables",
)
OPTIONS = ("device", "tests", "overrides", "cases")


@dataclass(frozen=True)
class Merged:
    """One run; how many duplicates were dropped, and the shards of which no run is complete."""

    run: Run
    dropped: int
    missing: tuple[str, ...]


def merge(runs: Sequence[ReadRun]) -> Merged:
    """The one run that these are parts of, oldest first.

    Of a case that several have, a record with a searched need stays, else the newer. The environment is what they
    share; text that differs stands side by side, and `environment.merged` has what each file said. It is complete with
    a complete run of every shard; of runs that are no shards, when all are.

    Raises:
        UsageError: where there are not two, or they are no parts of one sweep, or disagree about a case.
        RunFileError: where a record was refused in reading, or a file does not say which shard it is.
    """
    if len(runs) < 2:
        raise UsageError(f"merge: {runs[0].path if runs else 'no file'}: is one run; name two or more")
    for run in runs:
        if run.refused:
            raise RunFileError(f"{run.path}: {run.refused[0]}")
    first = runs[0]
    shards = [_shard(run) for run in runs]
    for other in runs[1:]:
        _check(first, other)
    records, dropped = _records(runs)
    if place := {id: number for number, id in enumerate(_ids(first, "cases"))}:
        records.sort(key=lambda record: place.get(record.id.rpartition("#")[0] or record.id, len(place)))
    missing = _missing(runs, shards)
    aliases: dict[str, list[str]] = {}
    for run in runs:
        aliases |= run.run.aliases
    update = {
        "environment": _environment(runs),
        "options": _options(runs),
        "aliases": aliases,
        "complete": not missing if shards[0] else all(run.run.complete for run in runs),
        "records": records,
    }
    return Merged(first.run.model_copy(update=update), dropped, missing)


def joined(runs: Sequence[ReadRun], order: Sequence[str], more: Sequence[Record] = ()) -> Run:
    """The run that one sweep's xdist workers kept in these journals, with `more` records, in this order of ids.

    The environment is what they share, as in `merge`; `environment.merged` has which GPU measured which cases.
    """
    first = runs[0].run
    environment = first.environment
    if len(runs) > 1:
        environment = _environment(runs)
        for run, part in zip(runs, environment["merged"], strict=True):
            part["cases"] = [record.id for record in run.records]
    aliases: dict[str, list[str]] = {}
    for run in runs:
        aliases |= run.run.aliases
    place = {id: number for number, id in enumerate(order)}
    records = [*best_records(run.run for run in runs), *more]
    records.sort(key=lambda record: place.get(record.id, place.get(record.id.rpartition("#")[0], len(place))))
    return first.model_copy(update={"environment": environment, "aliases": aliases, "records": records})


def apart(environment: Mapping[str, Any]) -> str:
    """What keeps runs apart, as text: runs for which it is the same may be one."""
    return json.dumps(_apart(environment), sort_keys=True, default=str)


def _apart(environment: Mapping[str, Any]) -> dict[str, Any]:
    driver = environment.get("driver")
    branch = {"driver": driver.split(".")[0]} if isinstance(driver, str) else {}
    return {key: {**environment, **branch}.get(key) or None for key in ENVIRONMENT}


def _shard(run: ReadRun) -> Shard | None:
    text = run.run.options.get("shard")
    if text is None:
        return None
    try:
        return Shard.parse(str(text))
    except UsageError as error:
        raise RunFileError(f"{run.path}: options.shard: {text!r} is no shard") from error


def _missing(runs: Sequence[ReadRun], shards: Sequence[Shard | None]) -> tuple[str, ...]:
    there = {shard for run, shard in zip(runs, shards, strict=True) if run.run.complete}
    of = shards[0].of if shards[0] else 0
    return tuple(str(shard) for number in range(1, of + 1) if (shard := Shard(number, of)) not in there)


def _ids(run: ReadRun, option: str) -> list[str]:
    """The ids of cases that an option of a run has."""
    found = run.run.options.get(option)
    return [id for id in found if isinstance(id, str)] if isinstance(found, list) else []


def _check(first: ReadRun, other: ReadRun) -> None:
    """Raises UsageError, naming the first thing in which they are no parts of one sweep."""
    for (key, wanted), (_, found) in zip(_same(first), _same(other), strict=True):
        if wanted != found:
            differs = f"{key}: {_short(wanted)} there, {_short(found)} here"
            raise UsageError(f"{other.path}: cannot be merged with {first.path}: {differs}")


def _same(run: ReadRun) -> list[tuple[str, Any]]:
    """What must be the same, by name."""
    shard = _shard(run)
    return [
        ("sweep", run.run.sweep),
        ("shards", shard and shard.of),
        *_apart(run.run.environment).items(),
        *((key, run.run.options.get(key) or None) for key in OPTIONS),
    ]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _records(runs: Sequence[ReadRun]) -> tuple[list[Record], int]:
    """All records, each case once, and how many were dropped for that."""
    found: dict[str, tuple[ReadRun, Record]] = {}
    count = 0
    for run in runs:
        for record in run.records:
            count += 1
            if record.id in found:
                old_run, old = found[record.id]
                if problem := _disagreement(old, record):
                    raise UsageError(f"{run.path}: disagrees with {old_run.path} about {record.id}: {problem}")
                if old.memory.need_bytes and not record.memory.need_bytes:
                    continue
            found[record.id] = run, record
    return [record for _, record in found.values()], count - len(found)


def _disagreement(old: Record, new: Record) -> str | None:
    """In what two records of one id differ that should not, or None."""
    if old.case != new.case:
        return "another case, in steps or weights"
    for key in ("method", "status"):
        if getattr(old, key) != getattr(new, key):
            return f"{key}: {getattr(old, key)} there, {getattr(new, key)} here"
    needs = old.memory.need_bytes, new.memory.need_bytes
    tolerance = max(old.memory.need_tolerance_bytes or 0, new.memory.need_tolerance_bytes or 0)
    if needs[0] and needs[1] and abs(needs[0] - needs[1]) > tolerance:
        return f"need_bytes: {needs[0]} there, {needs[1]} here, with a tolerance of {tolerance}"
    return None


def _environment(runs: Sequence[ReadRun]) -> dict[str, Any]:
    """What all say, and under `merged` what each file says of the rest; `started` is the earliest."""
    all_of = [run.run.environment for run in runs]
    keys = dict.fromkeys(key for one in all_of for key in one if key != "merged")
    differing = [key for key in keys if any(one.get(key) != all_of[0].get(key) for one in all_of)]
    merged: dict[str, Any] = {key: all_of[0].get(key) for key in keys}
    for key in differing:
        values = list(dict.fromkeys(value for one in all_of if isinstance(value := one.get(key), str)))
        merged[key] = (min(values) if key == "started" else ", ".join(values)) if values else None
    parts: list[Any] = []
    for run, one in zip(runs, all_of, strict=True):
        before = one.get("merged")
        parts += before if isinstance(before, list) else [_part(run, [*differing, "host", "gpu_uuid", "started"])]
    return {**merged, "merged": parts}


def _part(run: ReadRun, keys: Sequence[str]) -> dict[str, Any]:
    environment = run.run.environment
    return {
        "file": run.name,
        "shard": run.run.options.get("shard"),
        "complete": run.run.complete,
        "records": len(run.records),
        **{key: environment[key] for key in dict.fromkeys(keys) if key in environment},
    }


def _options(runs: Sequence[ReadRun]) -> dict[str, Any]:
    """What all were asked for, null where they differ. `deselected` is what none was."""
    all_of = [run.run.options for run in runs]
    options = {key: value if all(one.get(key) == value for one in all_of) else None for key, value in all_of[0].items()}
    deselected = set.intersection(*(set(_ids(run, "deselected")) for run in runs)) - set(_ids(runs[0], "cases"))
    selection = options.get("selection") or {}
    whole = {key: value for key, value in options.items() if key not in ("shard", "cases")}
    return {**whole, "deselected": sorted(deselected), "selection": selection}

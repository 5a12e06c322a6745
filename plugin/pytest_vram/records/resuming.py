"""What `--vram-resume` goes on with: the newest unfinished run that nobody else is at, if it is of the same sweep."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pytest_vram.cases.case import AnyCase
from pytest_vram.errors import RunFileError, UsageError
from pytest_vram.records.files import claim, is_torn, read_journal, read_run
from pytest_vram.records.schema import NOT_FOR_MEMORY, SEARCH_INTERRUPTED, Record, Run

DONE = ("ok", "oom", "skipped")  # a resumed sweep tries everything else again
# One run has one environment: a record made with another of these would stand beside figures that it has no part in.
SAME_ENVIRONMENT = (
    "gpu",
    "gpu_memory_bytes",
    "mig",
    "power_limit_w",
    "driver",
    "torch",
    "cuda",
    "cudnn",
    "diffusers",
    "transformers",
    "accelerate",
    "pytest-vram",
    "python",
    "variables",
    "start",
    "commit",
    "dirty",
    "changes",
)
# What decides of each case what is found, by the option that says it; runs of older versions lack some.
SAME_OPTIONS = {
    "overrides": "--vram-models and its like",
    "limit_bytes": "--vram-limit",
    "workers": "--vram-workers",
    "rounds": "--vram-rounds",
    "need": "--vram-no-need",
}
OPTION = "--vram-resume"
ANEW = f"leave {OPTION} out to start a new run"


@dataclass(frozen=True)
class Unfinished:
    """A run to go on with, and its file; nobody else goes on with it while `held` is open. `notes` are for people."""

    path: Path
    run: Run
    held: BinaryIO
    notes: list[str] = field(default_factory=list)


def is_done(record: Record) -> bool:
    """Whether a resumed sweep need not measure this case again: it has a result, and the search for its need was not
    cut short by anything but memory."""
    no_need = record.unavailable.get("memory.need_bytes", "")
    return record.status in DONE and no_need != SEARCH_INTERRUPTED and NOT_FOR_MEMORY not in no_need


def shard_of(run: Run) -> Any:
    """The shard that a run says it is, or None."""
    return run.options.get("shard")


def unfinished(folder: Path) -> Iterator[tuple[Path, Run]]:
    """Journals and run files of a folder that lack cases or hold failed ones, with their runs, the newest first."""
    journals = set(folder.glob("*.jsonl"))
    files = {path for path in folder.glob("*.json") if path.with_suffix(".jsonl") not in journals}
    for path in sorted(journals | files, key=lambda path: path.name, reverse=True):
        try:
            run = read_journal(path) if path.suffix == ".jsonl" else read_run(path)
        except RunFileError:
            continue  # not ours to judge here: whoever names the file gets the message
        if not run.complete or not all(map(is_done, run.records)):
            yield path, run


def find_unfinished(folder: Path, shard: str | None) -> Unfinished | None:
    """The newest unfinished run of a folder, of this shard if there is one, that no other sweep is at.

    Raises:
        UsageError: where others are at all that there are.
    """
    found = list(unfinished(folder))
    found.sort(key=lambda one: shard_of(one[1]) != shard)  # a stable order: the newest of this shard, then the rest
    running: list[str] = []
    for path, run in found:
        held = claim(path)
        if held is None:
            running.append(path.name)
            continue
        notes = [f"{OPTION}: passed over {name}: another sweep is writing it" for name in running]
        if path.suffix == ".jsonl" and is_torn(path):
            notes.append(f"{OPTION}: the last line of {path.name} was cut off: its case is run again")
        return Unfinished(path, run, held, notes)
    if running:
        raise UsageError(f"{OPTION}: {folder / running[0]} belongs to a sweep that is still running; {ANEW}")
    return None


def kept(found: Unfinished, run: Run, planned: Mapping[str, AnyCase]) -> list[Record]:
    """The records of an unfinished run that `run`, with these cases planned, need not make again.

    Raises:
        UsageError: where it is another sweep, shard, commit or environment.
    """
    path, old = found.path, found.run
    if (shard := shard_of(old)) != shard_of(run):
        what = f"shard {shard}; give --vram-shard {shard}, or" if shard else "no shard;"
        raise UsageError(f"{OPTION}: {path} is {what} {ANEW}")
    for key in SAME_ENVIRONMENT:
        _refuse_another(path, key, old.environment.get, run.environment.get, ANEW)
    if old.sweep != run.sweep:
        raise UsageError(f"{OPTION}: {path} is of the sweep {old.sweep!r}; give --vram-sweep {old.sweep}, or {ANEW}")
    for key, option in SAME_OPTIONS.items():
        if key in old.options:
            _refuse_another(path, key, old.options.get, run.options.get, f"give the same {option}, or {ANEW}")
    if old.options.get("cases") != run.options.get("cases"):
        raise UsageError(f"{OPTION}: {path} is a shard of other cases; give the same options")
    for record in old.records:
        if planned.get(record.id, record.case) != record.case:
            raise UsageError(
                f"{OPTION}: {path} measured {record.id} with other steps or weights; give the same options"
            )
    return list(filter(is_done, old.records))


def _refuse_another(path: Path, key: str, old: Callable[[str], Any], new: Callable[[str], Any], instead: str) -> None:
    if old(key) != new(key):
        raise UsageError(f"{OPTION}: {path} was made with {key} {old(key)}, this is {new(key)}; {instead}")

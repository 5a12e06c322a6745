"""What `--vram-resume` goes on with: the newest unfinished run that nobody else is at, if it is of the same sweep."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pytest_vram.cases.case import AnyCase
from pytest_vram.errors import RunFileError, UsageError
from pytest_vram.records.files import (
    best_records,
    claim,
    is_torn,
    journals_of,
    read_journal,
    read_run,
    run_path_of,
)
from pytest_vram.records.schema import CHECK_INTERRUPTED, NOT_FOR_MEMORY, SEARCH_INTERRUPTED, Record, Run

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
    "difference": "--vram-no-difference",
}
OPTION = "--vram-resume"
ANEW = f"leave {OPTION} out to start a new run"


@dataclass(frozen=True)
class Unfinished:
    """A run to go on with, and its file; nobody else goes on with it while `held` is open. `notes` are for people."""

    path: Path
    run: Run
    held: list[BinaryIO]
    notes: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Let others go on with it."""
        for file in self.held:
            file.close()


def is_done(record: Record) -> bool:
    """Whether a resumed sweep need not measure this case again: it has a result, and neither the search for its need
    nor the check for leaks was cut short by anything but memory."""
    no_need, no_drift = (record.unavailable.get(key, "") for key in ("memory.need_bytes", "drift"))
    cut_short = no_need.startswith(SEARCH_INTERRUPTED) or NOT_FOR_MEMORY in no_need or no_drift == CHECK_INTERRUPTED
    return record.status in DONE and not cut_short


def shard_of(run: Run) -> Any:
    """The shard that a run says it is, or None."""
    return run.options.get("shard")


def unfinished(folder: Path) -> Iterator[tuple[Path, Run]]:
    """Journals and run files of a folder that lack cases or hold failed ones, with their runs, the newest first; the
    journals that xdist workers left are one run."""
    journals: dict[Path, list[Path]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        journals.setdefault(run_path_of(path), []).append(path)
    for run_path in sorted(journals.keys() | set(folder.glob("*.json")), key=lambda path: path.name, reverse=True):
        parts = journals.get(run_path, [])
        try:
            runs = [read_journal(path) for path in parts] or [read_run(run_path)]
        except RunFileError:
            continue  # not ours to judge here: whoever names the file gets the message
        run = runs[0].model_copy(update={"records": best_records(runs)})
        if not run.complete or not all(map(is_done, run.records)):
            yield (parts[0] if parts else run_path), run


def find_unfinished(folder: Path, shard: str | None) -> Unfinished | None:
    """The newest unfinished run of a folder, of this shard if there is one, that no other sweep is at.

    Raises:
        UsageError: where others are at all that there are.
    """
    found = list(unfinished(folder))
    found.sort(key=lambda one: shard_of(one[1]) != shard)  # a stable order: the newest of this shard, then the rest
    running: list[str] = []
    for path, run in found:
        files = journals_of(run_path_of(path)) or [path]
        held: list[BinaryIO] = []
        if not _claim_all(files, held):
            running.append(path.name)
            continue
        notes = [f"{OPTION}: passed over {name}: another sweep is writing it" for name in running]
        torn = [file.name for file in files if file.suffix == ".jsonl" and is_torn(file)]
        notes += [f"{OPTION}: the last line of {name} was cut off: its case is run again" for name in torn]
        return Unfinished(path, run, held, notes)
    if running:
        raise UsageError(f"{OPTION}: {folder / running[0]} belongs to a sweep that is still running; {ANEW}")
    return None


def _claim_all(files: Sequence[Path], held: list[BinaryIO]) -> bool:
    """Whether nobody else is at any of these; `held` has them locked then, and is empty otherwise."""
    for path in files:
        file = claim(path)
        if file is None:
            for other in held:
                other.close()
            held.clear()
            return False
        held.append(file)
    return True


def known(records: Mapping[str, Record], case: AnyCase) -> Record | None:
    """The record of this very case, where it need not be made again."""
    record = records.get(case.id)
    return record if record is not None and record.case == case and is_done(record) else None


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

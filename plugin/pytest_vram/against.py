"""A sweep against a base: from `--vram-compare` to the verdict, with fresh workers for the times that look slower."""

import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from pytest_vram.cases.case import AnyCase
from pytest_vram.cases.thresholds import Limits, Thresholds, read_project
from pytest_vram.compare.comparing import check_comparable, compare, compare_case, flagged
from pytest_vram.compare.comparison import CaseComparison, Comparison, comparison_json
from pytest_vram.compare.finding import Like, find_run
from pytest_vram.compare.keys import case_difference, hard_differences, identity_difference
from pytest_vram.compare.timing import MORE_WORKERS, WORKERS, Again, medians, wants_more
from pytest_vram.errors import UsageError, VramError
from pytest_vram.measure.again import Checkout, NotMeasured, other_checkout, this_checkout
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import Record, Run
from pytest_vram.report.comparing import as_markdown

FOLDER = "comparisons"


@dataclass(frozen=True)
class BaseOptions:
    """What to compare with: `name` as `find_run` takes it, and the base's checkout for measuring it again."""

    name: str
    checkout: Path | None = None
    across: tuple[str, ...] = ()
    strict: bool = False


class Base:
    """The run that this one is compared with, found and checked before the first case."""

    def __init__(
        self,
        options: BaseOptions,
        head: Run,
        results: Path,
        root: Path,
        thresholds: Mapping[str, Thresholds],
        resumed: Path | None = None,
    ) -> None:
        """`head` is this run, without records, and `resumed` its file where it goes on with one; `thresholds` are those
        of the matrix that planned a case, by its id.

        Raises:
            UsageError: where there is no such base, it is not comparable, or its checkout is not what it should be.
        """
        self.options, self.root = options, root
        self.limits = Limits([read_project(root)], thresholds)
        self.checkout: Checkout | None = None
        try:
            this = ReadRun(resumed or Path("this run"), head)
            like = Like.run(this, options.across)
            self.run = find_run(options.name, results, root, like)
            check_comparable(self.run, this, options.across)
        except VramError as error:
            raise UsageError(f"--vram-compare: {str(error).replace('--across', '--vram-across')}") from error
        if options.checkout is not None:
            commit, dirty = (self.run.run.environment.get(key) for key in ("commit", "dirty"))
            if dirty:
                raise UsageError("--vram-base-checkout: the base was run with changes that no commit has; make it anew")
            self.checkout = other_checkout(options.checkout, root, commit if isinstance(commit, str) else None)

    def check_cases(self, ids: Set[str], cases: Mapping[str, AnyCase], all_shards: Set[str] = frozenset()) -> None:
        """Raises UsageError where the base has none of these, or none like them; `cases` are those known so far.

        A shard's may all be new, where the base has some of those of `all_shards`.
        """
        common = [record for record in self.run.records if record.id in ids]
        if not common and any(record.id in all_shards for record in self.run.records):
            return
        if not common:
            raise UsageError(
                f"--vram-compare: {self.run.path} has none of these cases, such as {min(ids, default='none')}; "
                f"give a base of the same sweep and of the same rootdir ({self.root})"
            )
        others = [
            (record.id, identity_difference(record.case, cases[record.id], self.options.across))
            for record in common
            if record.id in cases
        ]
        if len(others) == len(common) and all(difference for _, difference in others):
            name, key = others[0]
            assert key
            raise UsageError(
                f"--vram-compare: {self.run.path} has no case like these: {name}: {key.key} is {key.base} there, "
                f"{key.head} here; give the same options, or --vram-across {key.key}"
            )

    def so_far(self, record: Record) -> CaseComparison | None:
        """What is known of a case before times are confirmed; None where the base lacks it."""
        old = next((old for old in self.run.records if old.id == record.id), None)
        return None if old is None else compare_case(old, record, self.limits, self.options.across)

    def flagged(self, head: ReadRun) -> list[str]:
        """The cases that fresh workers should decide."""
        return flagged(self.run, head, self.limits, self.options.across)

    def has_stored_workers(self, id: str) -> bool:
        """Whether the base's stored workers are enough for a verdict without measuring it again."""
        return any(old.id == id and len(old.time.workers) >= WORKERS for old in self.run.records)

    def measure_again(
        self,
        tests: Mapping[str, str],
        models: Mapping[str, str],
        options: Callable[[Path], Sequence[str]],
        folder: Path,
        timeout_s: float,
        say: Callable[[str], None],
    ) -> tuple[dict[str, Again], list[str]]:
        """Fresh workers for both sides in turn: by case id, and notes of what could not be measured.

        `tests` are the cases' node ids, `models` their models; `options` gives pytest's options for a rootdir; `folder`
        takes the run files.
        """
        assert self.checkout is not None
        sides = {"base": self.checkout, "head": this_checkout(self.root)}
        found: dict[str, dict[str, list[Record]]] = {id: {"base": [], "head": []} for id in tests}
        wanted, notes = list(tests), []
        for turn in range(WORKERS + MORE_WORKERS):
            if turn == WORKERS:
                wanted = [id for id in wanted if self._wants_more(id, models[id], found[id])]
            for side in ("base", "head") if turn % 2 == 0 else ("head", "base"):
                if not wanted:
                    break
                say(f"{len(wanted)} cases again, turn {turn + 1}: {side}")
                try:
                    self._take(sides[side], side, tests, wanted, found, options, folder / side, timeout_s)
                except NotMeasured as error:
                    notes.append(f"the {side} could not be measured again: {error}")
                    wanted = []
        again = {id: Again(both["base"], both["head"]) for id, both in found.items()}
        whole = {id: one for id, one in again.items() if min(len(medians(one.base)), len(medians(one.head))) >= WORKERS}
        lost = [id for id in again if id not in whole]
        if lost and not notes:
            notes.append(f"not measured again on both sides: {', '.join(lost[:5])}{' ...' if lost[5:] else ''}")
        return whole, notes

    def _take(
        self,
        checkout: Checkout,
        side: str,
        tests: Mapping[str, str],
        wanted: list[str],
        found: Mapping[str, Mapping[str, list[Record]]],
        options: Callable[[Path], Sequence[str]],
        folder: Path,
        timeout_s: float,
    ) -> None:
        """One turn of one side; tests that it does not have are no longer `wanted`.

        Raises:
            NotMeasured: when nothing came of it, or it was measured with something else than the base's run.
        """
        told = options(checkout.root)
        try:
            run = checkout.measure([tests[id] for id in wanted], told, folder, timeout_s * len(wanted))
        except NotMeasured as error:
            left = [id for id in wanted if tests[id] not in error.unknown]
            if not error.unknown or not left:
                raise
            wanted[:] = left
            run = checkout.measure([tests[id] for id in wanted], told, folder, timeout_s * len(wanted))
        other = [d for d in hard_differences(self.run.run, run) if d.key not in self.options.across]
        if other:
            raise NotMeasured(f"{other[0].key} is {other[0].head} there, and {other[0].base} in the base's run")
        known = {record.id: record for record in self.run.records}
        for record in run.records:
            same = record.id in known and case_difference(known[record.id], record, self.options.across) is None
            if record.id in found and same and record.status == "ok":
                found[record.id][side].append(record)

    def _wants_more(self, id: str, model: str, both: Mapping[str, Sequence[Record]]) -> bool:
        limit = self.limits.of("time", model, id)
        sides = medians(both["base"]), medians(both["head"])
        return all(sides) and wants_more(*sides, limit["relative"], limit["absolute_s"])

    def conclude(self, head: ReadRun, again: Mapping[str, Again], notes: Sequence[str] = ()) -> Comparison:
        """The verdict; raises NotComparable."""
        options = self.options
        found = compare(self.run, head, self.limits, across=options.across, again=again, strict=options.strict)
        return found.model_copy(update={"notes": [*found.notes, *notes]})


def save(comparison: Comparison, run_path: Path) -> Path:
    """Write the comparison as JSON and Markdown, and into GitHub's step summary; gives the JSON file's path.

    Raises:
        UsageError: naming what cannot be written.
    """
    path = run_path.parent / FOLDER / run_path.name
    text = as_markdown(comparison)
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(comparison_json(comparison), encoding="utf-8")
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise UsageError(f"--vram-compare: {error.filename} cannot be written: {error.strerror}") from error
    return path

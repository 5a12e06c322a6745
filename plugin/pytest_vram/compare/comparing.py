"""Two runs, case by case and metric by metric. The rule, each clause of which is tested:

**Status.** A case that completed and no longer does is worse; one that runs out of memory is better than one that
fails. A case that the head lacks although it was asked for the same has vanished, which counts as worse.

**Memory** is deterministic in one environment. Worse is above a limit: allocated, whole and by phase, by more than 2 %
of the base's and 32 MiB; the need by more than 2 % and twice the tolerance of its search; host memory by more than 5 %
and 256 MiB. Better is the mirror. A figure that became null is worse. Reserved, NVML and required memory gate nothing:
they follow the pool's history, or from the need.

**Effects.** An optimization that took effect and no longer does is worse.

**Time** is timing.py's. A record whose figures cannot be true is worse in the head, and not comparable in the base.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pytest_vram.cases.thresholds import Limits
from pytest_vram.compare.comparison import ORDER, CaseComparison, Change, Comparison, Difference, Side, Word
from pytest_vram.compare.keys import case_difference, hard_differences, remarks
from pytest_vram.compare.timing import Again, became_null, screen, time_change
from pytest_vram.errors import NotComparable
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import NOT_SEARCHED, Record

NEED, ALLOCATED, HOST = "memory.need_bytes", "memory.allocated_peak_bytes", "memory.host_peak_bytes"
_RANK = {"ok": 0, "oom": 1, "skipped": 2, "timeout": 3, "error": 3}


def check_comparable(base: ReadRun, head: ReadRun, across: Collection[str] = ()) -> list[Difference]:
    """The hard keys that differ and were lifted.

    Raises:
        NotComparable: naming each that was not.
    """
    different = hard_differences(base.run, head.run)
    left = [d for d in different if d.key not in across]
    if left:
        what = "; ".join(f"{d.key}: {d.base} in the base, {d.head} in the head" for d in left)
        lift = f"--across {','.join(d.key for d in left)}"
        raise NotComparable(
            f"{base.path}: is not comparable with {head.path}: {what}; {lift} compares them nevertheless"
        )
    return different


def compare(
    base: ReadRun,
    head: ReadRun,
    limits: Limits,
    *,
    across: Collection[str] = (),
    again: Mapping[str, Again] | None = None,
    strict: bool = False,
) -> Comparison:
    """What the head changed; `again` has the records of fresh workers, by case id.

    Raises:
        NotComparable: where a hard key differs that is not in `across`, or the two have no case in common.
    """
    lifted = check_comparable(base, head, across)
    before, now = ({record.id: record for record in run.records} for run in (base, head))
    unreadable = {run: {r.id: r.problem for r in run.refused if r.id is not None} for run in (base, head)}
    cases: list[CaseComparison] = []
    case_keys: dict[str, Difference] = {}
    for record in head.records:
        old = before.get(record.id)
        if old is not None:
            cases.append(compare_case(old, record, limits, across, (again or {}).get(record.id)))
            case_keys |= _lifted(old, record, across)
        elif problem := unreadable[base].get(record.id):
            cases.append(CaseComparison(id=record.id, verdict="not comparable", reason=f"base: {problem}"))
        else:
            cases.append(CaseComparison(id=record.id, verdict="new"))
    for name, problem in unreadable[head].items():
        cases.append(CaseComparison(id=name, verdict="worse", reason=f"impossible figures: {problem}"))
    missing = [name for name in (*before, *unreadable[base]) if name not in now and name not in unreadable[head]]
    left_out = set(_left_out(base, head, missing))
    for name in missing:
        if name not in left_out:
            why = "" if head.run.complete else "the head's run is not complete"
            cases.append(CaseComparison(id=name, verdict="vanished", reason=why))
    both = ({*before, *unreadable[base]} & {*now, *unreadable[head]}) | set(unreadable[head])
    common = [case for case in cases if case.id in both]
    if not common and not _is_of_new_cases(base, head):
        raise NotComparable(f"{base.path}: has no case of {head.path}; give a base of the same sweep and options")
    if common and all(case.verdict == "not comparable" for case in common):
        raise NotComparable(f"{base.path}: no case is comparable with {head.path}: {common[0].id}: {common[0].reason}")
    return Comparison(
        base=_side(base),
        head=_side(head),
        sweep=head.run.sweep,
        strict=strict,
        across=[*lifted, *case_keys.values()],
        remarks=remarks(base.run, head.run),
        notes=list(_notes(base, head, cases, left_out)),
        cases=cases,
    )


def flagged(base: ReadRun, head: ReadRun, limits: Limits, across: Collection[str] = ()) -> list[str]:
    """The ids of the cases that look slower at first sight, which fresh workers can decide."""
    before = {record.id: record for record in base.records}
    found = []
    for record in head.records:
        old = before.get(record.id)
        if old is None or not old.status == record.status == "ok" or case_difference(old, record, across):
            continue
        if screen(old, record, limits.of("time", record.case.model, record.id)) == "slower":
            found.append(record.id)
    return found


def compare_case(
    base: Record, head: Record, limits: Limits, across: Collection[str] = (), again: Again | None = None
) -> CaseComparison:
    """One case that both sides have."""
    if other := case_difference(base, head, across):
        reason = f"{other.key}: {other.base} in the base, {other.head} in the head"
        return CaseComparison(id=head.id, verdict="not comparable", reason=reason)
    if base.status == head.status == "ok":
        changes = list(_changes(base, head, limits, again))
        verdicts = [change.verdict for change in changes if change.verdict != "not comparable"]
        worst = min(verdicts, key=ORDER.index, default="same")
        return CaseComparison(id=head.id, verdict=worst, changes=changes)
    return CaseComparison(id=head.id, verdict=_by_status(base, head), reason=_status(base, head))


def _by_status(base: Record, head: Record) -> Word:
    rank = _RANK[head.status] - _RANK[base.status]
    if "skipped" in (base.status, head.status) and rank < 0:  # it ran for the first time, or failed and runs no more
        return "new" if base.status == "skipped" else "same"
    return "worse" if rank > 0 else "better" if rank < 0 else "same"


def _status(base: Record, head: Record) -> str:
    def said(record: Record) -> str:
        where = f" in {record.failure.phase}" if record.failure and record.failure.phase else ""
        return f"{'out of memory' if record.status == 'oom' else record.status}{where}"

    why = head.reason or (head.failure.message if head.failure and head.status != "oom" else "")
    return f"{said(base)} → {said(head)}{f': {why}' if why else ''}"


def _changes(base: Record, head: Record, limits: Limits, again: Again | None) -> Iterator[Change]:
    def limit(metric: str) -> dict[str, Any]:
        return limits.of(metric, head.case.model, head.id)

    allocated, need, host = limit("allocated"), limit("need"), limit("host")
    yield from _memory(ALLOCATED, base.memory.allocated_peak_bytes, head.memory.allocated_peak_bytes, allocated, head)
    for phase, cost in base.phases.items():
        after = head.phases.get(phase)
        metric = f"phases.{phase}.allocated_peak_bytes"
        yield from _memory(
            metric, cost.allocated_peak_bytes, after.allocated_peak_bytes if after else None, allocated, head
        )
    tolerance = max(base.memory.need_tolerance_bytes or 0, head.memory.need_tolerance_bytes or 0)
    need["absolute"] = max(need.get("absolute", 0), 2 * tolerance)
    yield from _memory(NEED, base.memory.need_bytes, head.memory.need_bytes, need, head)
    yield from _memory(HOST, base.memory.host_peak_bytes, head.memory.host_peak_bytes, host, head)
    for name, effect in base.effects.items():
        after_effect = head.effects.get(name)
        if after_effect is not None and after_effect != effect:
            verdict: Word = "better" if after_effect == "applied" else "worse"
            yield Change(metric=f"effects.{name}", verdict=verdict, reason=f"{effect} → {after_effect}")
    if timed := time_change(base, head, limit("time"), again):
        yield timed


def _memory(
    metric: str, before: int | None, now: int | None, limit: Mapping[str, Any], head: Record
) -> Iterator[Change]:
    """Nothing where the base has no figure: there is nothing to become worse."""
    if before is None:
        return
    allowed = max(limit["relative"] * before, limit.get("absolute", 0))
    if now is None:
        asked = head.unavailable.get(metric) != NOT_SEARCHED
        reason = became_null(head, metric) if asked else NOT_SEARCHED
        yield Change(
            metric=metric, verdict="worse" if asked else "not comparable", base=before, allowed=allowed, reason=reason
        )
        return
    verdict: Word = "worse" if now - before > allowed else "better" if before - now > allowed else "same"
    yield Change(metric=metric, verdict=verdict, base=before, head=now, allowed=allowed)


def _lifted(base: Record, head: Record, across: Collection[str]) -> dict[str, Difference]:
    """The keys of the case that differ and were lifted."""
    found: dict[str, Difference] = {}
    for key in across:
        others = set(across) - {key}
        difference = case_difference(base, head, others)
        if difference is not None and difference.key == key:
            found[key] = difference
    return found


def _left_out(base: ReadRun, head: ReadRun, missing: list[str]) -> list[str]:
    """Which of the base's cases the head did not ask for: they have not vanished."""
    if base.run.sweep != head.run.sweep or any(
        _as_written(base.run.options.get(key)) != _as_written(head.run.options.get(key))
        for key in ("tests", "overrides", "selection")
    ):
        return missing
    deselected = head.run.options.get("deselected")
    names = deselected if isinstance(deselected, list) else []
    return [name for name in missing if name in names or re.sub(r"#\d+$", "", name) in names]  # #2: measured twice


def _is_of_new_cases(base: ReadRun, head: ReadRun) -> bool:
    """Whether the head is a shard of a sweep of which the base has cases, if none of this shard."""
    cases = head.run.options.get("cases")
    return isinstance(cases, list) and any(record.id in cases for record in base.records)


def _as_written(value: Any) -> str:
    """A value as a file has it: a session's may be tuples, and what is empty an older file lacks."""
    return json.dumps(value or None, sort_keys=True)


def _notes(base: ReadRun, head: ReadRun, cases: list[CaseComparison], left_out: set[str]) -> Iterator[str]:
    timed = [change for case in cases for change in case.changes if change.metric.startswith("time.")]
    looked_at = [change for change in timed if change.verdict != "same" or change.workers]
    if looked_at and not any(change.again for change in looked_at):
        yield "base not measured again: times are compared with what is stored"
    elif not all(change.again for change in looked_at):
        yield "base not measured again for some cases: their times are compared with what is stored"
    for name, run in (("base", base), ("head", head)):
        if isinstance(shard := run.run.options.get("shard"), str):
            yield f"the {name} is shard {shard[:20]} of its sweep"
    if left_out:
        yield f"{len(left_out)} cases of the base are not in the head, which asked for fewer"
    if not base.run.complete:
        yield "the base's run is not complete"
    if not head.run.complete:
        yield "the head's run is not complete"
    for name, run in (("base", base), ("head", head)):
        for refused in run.refused:
            if refused.id is None:
                yield f"{name}: a record was left out: {refused.problem}"
    if any(change.reason == NOT_SEARCHED for case in cases for change in case.changes):
        yield "the head's needs were not searched (--vram-no-need)"


def _side(run: ReadRun) -> Side:
    environment = run.run.environment
    commit, dirty = environment.get("commit"), environment.get("dirty")
    return Side(
        name=run.name,
        commit=commit if isinstance(commit, str) else None,
        dirty=dirty if isinstance(dirty, bool) else None,
        started=run.started.isoformat(timespec="seconds") if run.started else None,
        gpu=run.gpu,
    )

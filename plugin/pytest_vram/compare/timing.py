"""Whether a call has become slower. Rounds of one process are not independent: the unit is the worker, its value the
median of its rounds.

A first look, the screen, compares the medians that the two runs have. What it flags is decided by fresh workers of both
sides in turn, three each; where the base cannot be measured again, by at least three stored ones and a wider threshold.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pytest_vram.cases.case import OwnCase
from pytest_vram.compare.comparison import Change, Word
from pytest_vram.records.schema import ABNORMAL, Record

METRIC = "time.median_s"
WORKERS = 3  # a side
# Where workers of one side differ by more than this, three that happen to lie in order prove little: two more a side
# decide before anything is called slower. With no change at all and a spread of 8 % between workers that takes false
# alarms from 1.5 % of the flagged cases to 0.1 %; bench/time_verdicts.py has the simulation.
QUIET_SPREAD = 0.02
MORE_WORKERS = 2
CLOCK_TOLERANCE = 0.02  # two SM clocks that differ by more explain a difference in time
# A GPU that is less far behind when the host has queued its work was waiting for the host: of a step, or of the call.
HOST_BOUND_STEPS = 0.25
HOST_BOUND_CALL = 0.05
# Against a stored base a machine's drift counts too: where workers of one side differ by more, nothing is decided. Runs
# of one commit on one machine were up to 1.4 times apart, by workers of up to 15 %; a GPU-bound case keeps within 2 %.
STORED_SPREAD = 0.05

Screened = Literal["same", "slower", "faster"]


@dataclass(frozen=True)
class Again:
    """The records of one case from fresh workers: base's and head's in turn, or the head's alone, where `base` is
    empty."""

    base: Sequence[Record]
    head: Sequence[Record]


def screen(base: Record, head: Record, limit: Mapping[str, Any]) -> Screened:
    """What the medians of two records say at first sight; `limit` has `relative` and `absolute_s`."""
    before, now = base.time.median_s, head.time.median_s
    if before is None or now is None:
        return "same"
    return _apart(before, now, limit["relative"], limit["absolute_s"])


def _apart(before: float, now: float, relative: float, absolute_s: float) -> Screened:
    if abs(now - before) <= absolute_s or max(now, before) <= (1 + relative) * min(now, before):
        return "same"
    return "slower" if now > before else "faster"


def decide(base: Sequence[float], head: Sequence[float], relative: float, absolute_s: float) -> Word:
    """The verdict of the medians of two sides' workers.

    Worse: every one of the head's is above every one of the base's, and their medians differ by more than the limit.
    Better is the mirror. Same: their medians do not differ by more. Ambiguous: they do, but the workers overlap.
    """
    apart = _apart(statistics.median(base), statistics.median(head), relative, absolute_s)
    if apart == "same":
        return "same"
    if apart == "slower":
        return "worse" if min(head) > max(base) else "ambiguous"
    return "better" if max(head) < min(base) else "ambiguous"


def spread(medians: Sequence[float]) -> float:
    """How far the workers of one side are apart, as a share of their median."""
    return (max(medians) - min(medians)) / statistics.median(medians)


def wants_more(base: Sequence[float], head: Sequence[float], relative: float, absolute_s: float) -> bool:
    """Whether these workers say slower, but differ too much among themselves for three to be believed."""
    said = decide(base, head, relative, absolute_s) == "worse"
    return said and min(len(base), len(head)) == WORKERS and max(spread(base), spread(head)) > QUIET_SPREAD


def medians(records: Sequence[Record]) -> list[float]:
    """The medians of all workers of some records."""
    return [worker.median_s for record in records for worker in record.time.workers]


def host_bound(record: Record) -> bool | None:
    """Whether the host's CPU, and not the GPU, decides how long a call takes; None where that is not known. It does
    where an offload moves weights, before the denoiser's first call, as a part of the call."""
    time = record.time
    if time.gpu_lag_s is None or time.median_s is None:
        return None
    may_move = isinstance(record.case, OwnCase) or any("offload" in name for name in record.case.optimizations)
    if may_move and time.step_s and (time.first_step_s or 0.0) - time.step_s > HOST_BOUND_CALL * time.median_s:
        return True
    least = HOST_BOUND_STEPS * time.step_s if time.step_s else HOST_BOUND_CALL * time.median_s
    return time.gpu_lag_s < least


def _host_decides(records: Sequence[Record]) -> bool:
    """Also where it is not known, of a GPU's run: the first versions did not record it."""
    known = [bound for record in records if (bound := host_bound(record)) is not None]
    return any(known) if known else any(record.memory.allocated_peak_bytes for record in records)


def time_change(base: Record, head: Record, limit: Mapping[str, Any], again: Again | None = None) -> Change | None:
    """The verdict on the time of a case that both sides completed, or None where the base has none."""
    before, now = base.time.median_s, head.time.median_s
    if before is None:
        return None
    relative, absolute_s = limit["relative"], limit["absolute_s"]
    allowed = max(relative * before, absolute_s)
    change = Change(metric=METRIC, verdict="same", base=before, head=now, allowed=allowed)
    if now is None:
        return change.model_copy(update={"verdict": "worse", "reason": became_null(head, METRIC)})
    screened = screen(base, head, limit)
    if screened == "same":
        return change
    if again is not None and again.base and again.head:
        sides = medians(again.base), medians(again.head)
        found: dict[str, Any] = {
            "base": statistics.median(sides[0]),
            "head": statistics.median(sides[1]),
            "verdict": decide(*sides, relative, absolute_s),
            "workers": sides,
            "again": True,
        }
        decided = _tempered(change.model_copy(update=found), again.base, again.head)
    else:
        fresh = again.head if again else [head]
        decided = _tempered(_stored(change, [base], fresh, limit), [base], fresh)
    faster = (decided.head or 0.0) < (decided.base or 0.0)
    if decided.verdict == "ambiguous" and faster:  # nobody needs to look into that
        return decided.model_copy(update={"verdict": "same", "reason": f"faster, not decided: {decided.reason}"})
    return decided


def _stored(change: Change, base: Sequence[Record], head: Sequence[Record], limit: Mapping[str, Any]) -> Change:
    sides = medians(base), medians(head)
    few = [
        f"the {name} has {len(side)}" for name, side in zip(("base", "head"), sides, strict=True) if len(side) < WORKERS
    ]
    if few:
        reason = f"a verdict takes {WORKERS} workers a side (--vram-workers {WORKERS}): {', '.join(few)}"
        return change.model_copy(update={"verdict": "ambiguous", "reason": reason})
    if decide(*sides, limit["relative"], limit["absolute_s"]) == "same":
        return change.model_copy(update={"workers": sides, "head": statistics.median(sides[1])})
    relative = max(limit["relative"], limit["stored_relative"])
    allowed = max(relative * (change.base or 0.0), limit["absolute_s"])
    verdict = decide(*sides, relative, limit["absolute_s"])
    found = {"verdict": verdict, "workers": sides, "allowed": allowed, "head": statistics.median(sides[1])}
    changed = change.model_copy(update=found)
    if verdict == "same":
        reason = "by less than a stored base can tell: measure it again (--vram-base-checkout)"
        return changed.model_copy(update={"verdict": "ambiguous", "reason": reason})
    if verdict != "ambiguous" and _host_decides([*base, *head]):
        reason = "the host's CPU decides this time, and drifts: measure the base again (--vram-base-checkout)"
        return changed.model_copy(update={"verdict": "ambiguous", "reason": reason})
    if verdict != "ambiguous" and max(map(spread, sides)) > STORED_SPREAD:
        reason = "the workers of one side differ too much: measure the base again (--vram-base-checkout)"
        return changed.model_copy(update={"verdict": "ambiguous", "reason": reason})
    return changed


def _tempered(change: Change, base: Sequence[Record], head: Sequence[Record]) -> Change:
    """At most ambiguous where the GPU's state, or somebody else's work, explains the difference."""
    if change.verdict == "ambiguous" and not change.reason:
        return change.model_copy(update={"reason": "the workers of the two sides overlap"})
    if change.verdict in ("same", "ambiguous"):
        return change
    clocks = [_clock(side) for side in (base, head)]
    reason = next((why for record in (*base, *head) if (why := _trouble(record))), "")
    if not reason and clocks[0] and clocks[1] and abs(clocks[1] / clocks[0] - 1) > CLOCK_TOLERANCE:
        reason = f"the SM clock was {clocks[0]:.0f} MHz for the base and {clocks[1]:.0f} MHz for the head"
    return change.model_copy(update={"verdict": "ambiguous", "reason": reason}) if reason else change


def _clock(records: Sequence[Record]) -> float | None:
    known = [r.sm_clock_mhz for record in records for r in record.telemetry.rounds if r.sm_clock_mhz]
    return statistics.median(known) if known else None


def _trouble(record: Record) -> str | None:
    if record.disturbed:
        return record.disturbed
    throttled = any(ABNORMAL & set(r.throttle) for r in record.telemetry.rounds)
    return "the GPU throttled" if throttled or record.time.rounds_discarded else None


def became_null(head: Record, metric: str) -> str:
    """Why a figure is not there any more."""
    group = metric.split(".")[0]
    return f"became null: {head.unavailable.get(metric) or head.unavailable.get(group) or 'it was not reported'}"

"""Verdicts: does a choice fit on a card, which choice to take there, and which card to buy.

The rule, for a need that was measured on one GPU and a card that is another:

- A program takes its need and a context. On the GPU that was measured the context is known. Elsewhere it counts as the
  measured one, but as no less than `ASSUMED_CONTEXT_BYTES`. It grows with the driver and the number of multiprocessors;
  the cards with more of them than the H100 that was measured have 32 GiB and more, of which 5 % are more than that.
- A card gives what PyTorch sees of its memory, less what a desktop holds.
- Fits: at least 5 % of that stay free, and the call is no slower than 1.25 × its time with room (or the card has the
  room that there was when that time was taken). A simulated need must leave another 10 % of itself free (of those in
  results/ that were searched too one alone was further off: the search found 22 % more than was simulated), unless the
  case was seen to complete under a limit of no more.
- Fits tightly: it fits into what the card gives, with less room than that; or less than the newest simulation asks for,
  where that is more than was found: which of two holes a tensor gets hangs on the addresses that the driver gives, and
  then the simulation took the other. Near the need a program can run out of memory under one cap that it completes
  under a lower one, so a tight fit is no promise.
- Does not fit: it requires more than the card gives; or it was seen to run out of memory with as much.
- Not supported: the card's hardware lacks the dtype.
- Not known: it ran out of memory on a smaller GPU, and its need is not known.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pytest_vram.records.schema import ASSUMED_CONTEXT_BYTES
from pytest_vram.report.cards import Card
from pytest_vram.report.choices import IN_EACH_STEP, ONCE_A_CALL, Choice, GpuKey, Workload, same_time
from pytest_vram.report.evidence import Evidence

FREE_SHARE = 0.05  # of what the card gives: driver versions and fragmentation move the need by up to that much
ESTIMATE_SHARE = 0.10  # of a simulated need
SLOWDOWN = 1.25

Outcome = Literal["fits", "tight", "no", "unsupported", "unknown"]
RUNS: tuple[Outcome, Outcome] = ("fits", "tight")
WORDS: dict[Outcome, str] = {"fits": "fits", "tight": "tight", "unknown": "?", "no": "no", "unsupported": "–"}


@dataclass(frozen=True, eq=False)
class Verdict:
    """One choice on one card. `required_bytes` is what the program takes there; None where that is not known."""

    outcome: Outcome
    choice: Choice
    card: Card
    required_bytes: int | None = None
    reason: str = ""

    @property
    def runs(self) -> bool:
        """Whether it fits, if only tightly."""
        return self.outcome in RUNS

    @property
    def estimated(self) -> bool:
        return self.choice.estimated

    @property
    def call_s(self) -> float | None:
        """Seconds of a call on the GPU that was measured, as slow as it is where there is no more room than here."""
        seconds = self.choice.call_s
        if seconds is None or self.outcome != "tight":
            return seconds
        return seconds * max(1.0, self.choice.slowdown or 1.0)


def judge(choice: Choice, card: Card) -> Verdict:
    """The verdict on one choice and one card, by the rule above."""
    if choice.gpus:
        return Verdict("no", choice, card, reason=f"it takes {len(choice.gpus)} GPUs")
    if lacking := card.lacks(choice.optimizations):
        return Verdict("unsupported", choice, card, reason=f"no {lacking} in hardware")
    need, usable = choice.need_bytes, card.usable_bytes
    if need is None:
        less = usable <= choice.at_least_bytes
        reason = "it ran out of memory with as much" if less else "its need is not known"
        return Verdict("no" if less else "unknown", choice, card, reason=reason)
    measured_context = choice.record.memory.context_bytes
    same = card.reported_as == choice.gpu and card.is_gpu(choice.gpu, choice.run.gpu_memory_bytes)
    known = same and not choice.estimated
    context = measured_context if known and measured_context else max(measured_context or 0, ASSUMED_CONTEXT_BYTES)
    required = max(need + context, choice.at_least_bytes)
    if required > usable:
        return Verdict("no", choice, card, required)
    if usable <= max(choice.ran_out_bytes + context, choice.at_least_bytes) or (same and choice.at_least_bytes):
        return Verdict("no", choice, card, required, "it ran out of memory with as much")
    room = usable - required
    if room < FREE_SHARE * usable:
        return Verdict("tight", choice, card, required, f"under {FREE_SHARE * 100:.0f} % free")
    if choice.estimated:
        seen = choice.completed_within is not None and choice.completed_within <= usable
        short = not seen and room < FREE_SHARE * usable + ESTIMATE_SHARE * need
        outcome: Outcome = "tight" if short else "fits"
        return Verdict(outcome, choice, card, required, "within the estimate's error" if short else "")
    if (choice.simulated_need_bytes or 0) + context > usable:
        return Verdict("tight", choice, card, required, "the simulation asks for more than was found")
    slow, room_when_timed = choice.slowdown, choice.record.memory.reserved_peak_bytes
    if slow is not None and slow > SLOWDOWN and (room_when_timed is None or usable < room_when_timed + context):
        return Verdict("tight", choice, card, required, f"up to {slow:.1f} times slower without more room")
    return Verdict("fits", choice, card, required)


def best(workload: Workload, card: Card, evidence: Evidence, *, plainly: bool = False) -> Verdict:
    """The choice to take for a workload on a card, with its verdict; `plainly` of those alone that leave the image as
    it is and all weights on the GPU.

    What fits comes before what fits tightly. Of that, what was measured on the card itself comes first, then each other
    GPU, the one that measured most before the others and those that searched no need last, then what was estimated; and
    of one of these the fastest wins. Of those within `same_time` of the fastest, and of what is no slower than one of
    them, a set that leaves the image alone comes first, then the one that moves weights least often, then the one with
    fewest flags, then the one that requires least; and it stands back for a part of its own flags that moves weights
    less often, or is within `same_time` of it. It also stands back for a set of a group after it that leaves the image
    alone, in two cases: it moves weights in each step and the other once a call at most; or the other is a part of it
    and moves them less often. A set with a flag that was seen to change nothing stands back for the set without it.
    Where nothing fits, a choice for more of the same (a larger size or batch) is taken if that does: it has room for
    this.
    """
    on_card = evidence.verdicts.setdefault((card.name, card.usable_bytes, card.compute_capability, plainly), {})
    tight: Verdict | None = None
    for one in (workload, *evidence.larger(workload)):
        verdict: Verdict | None = on_card.get(one)
        if verdict is None:
            verdict = on_card[one] = _of_its_own(one, card, evidence, plainly)
        if verdict.outcome == "fits":
            return verdict
        if verdict.runs and tight is None:
            tight = verdict
    found: Verdict = tight or on_card[workload]
    return found


def _of_its_own(workload: Workload, card: Card, evidence: Evidence, plainly: bool) -> Verdict:
    """The verdict from the choices of this workload alone."""

    def wanted(choices: Iterable[Choice]) -> list[Choice]:
        return [choice for choice in choices if not plainly or _is_plain(choice)]

    groups = [[judge(c, card) for c in wanted(choices)] for choices in _in_order(workload, card, evidence)]
    for outcome in RUNS:
        found = [[verdict for verdict in verdicts if verdict.outcome == outcome] for verdicts in groups]
        while found:
            if first := found.pop(0):
                return _calmest(_fastest(first), found)
    judged = [verdict for verdicts in groups for verdict in verdicts]
    tried = evidence.tried(workload)
    judged = judged or [judge(choice, card) for choice in wanted(tried)]
    nothing = Verdict("no", tried[0], card, reason="no set was tried that leaves the image and the weights as they are")
    return min(judged, key=_known_best, default=nothing)


def _is_plain(choice: Choice) -> bool:
    return not (choice.changes_image or choice.moves)


def _calmest(taken: Verdict, later: Sequence[Sequence[Verdict]]) -> Verdict:
    """What the one taken stands back for, and that for, of the groups after its own."""
    for verdicts in later:
        if calmer := [verdict for verdict in verdicts if _is_calmer(verdict.choice, taken.choice)]:
            return _calmest(_fastest(calmer), later)
    return taken


def _is_calmer(choice: Choice, than: Choice) -> bool:
    """Whether that is certain with no time: it moves weights once a call at most, and the other in each step; or it is
    a part of the other, and moves them less often. It must leave the image alone: where another image is taken, what
    was timed on one GPU is not given up for what was not."""
    once = choice.moves < IN_EACH_STEP <= than.moves
    part = set(choice.optimizations) < set(than.optimizations) and choice.moves < than.moves
    return (once or part) and not choice.changes_image


def _in_order(workload: Workload, card: Card, evidence: Evidence) -> list[list[Choice]]:
    """The choices to judge, group by group: of the card itself, then of other GPUs what it does not speak of itself."""
    groups = evidence.candidates(workload)
    if card.reported_as not in evidence.gpus:
        return groups
    own = [c for c in groups if c and c[0].gpu and card.is_gpu(c[0].gpu, c[0].run.gpu_memory_bytes)]
    told = {choice.optimizations for choices in own for choice in choices}
    return [*own, *([c for c in choices if c.optimizations not in told] for choices in groups if choices not in own)]


def _known_best(verdict: Verdict) -> tuple[int, bool, bool, int]:
    """Of what does not fit, the order in which it is named."""
    order, required = ("no", "unknown", "unsupported", *RUNS), verdict.required_bytes
    return order.index(verdict.outcome), required is None, verdict.estimated, required or 0


def _fastest(verdicts: Sequence[Verdict]) -> Verdict:
    if len(verdicts) == 1:
        return verdicts[0]

    def seconds(verdict: Verdict) -> float:
        return verdict.call_s or float("inf")

    def cost(verdict: Verdict) -> tuple[int, bool, int, int, int, float]:
        choice, changes = verdict.choice, verdict.choice.changes_image
        # where no time tells what a set costs: to change the image is as bad as to move weights once a call
        untimed = max(choice.moves, ONCE_A_CALL * changes) if seconds(verdict) == float("inf") else 0
        return untimed, changes, choice.moves, len(choice.flags), verdict.required_bytes or 0, seconds(verdict)

    def as_fast_as(first: Verdict, among: Iterable[Verdict]) -> list[Verdict]:
        return [v for v in among if seconds(v) <= same_time(v.choice, first.choice) * seconds(first)]

    slowest_s = max(map(seconds, as_fast_as(min(verdicts, key=seconds), verdicts)))
    found = min((verdict for verdict in verdicts if seconds(verdict) <= slowest_s), key=cost)
    parts = [v for v in verdicts if set(v.choice.optimizations) < set(found.choice.optimizations)]
    stiller = [v for v in parts if v.choice.moves < found.choice.moves]
    return _fastest(stiller) if stiller else min(as_fast_as(found, parts), key=cost, default=found)


def minimum(workload: Workload, cards: Sequence[Card], evidence: Evidence) -> Verdict | None:
    """The verdict on the smallest card that runs the workload at all, or None where none does."""
    return _smallest(cards, lambda card: best(workload, card, evidence), lambda verdict: verdict.runs)


def recommended(workload: Workload, cards: Sequence[Card], evidence: Evidence) -> Verdict | None:
    """The verdict on the smallest card that runs the workload comfortably: it fits, at full speed, with the image as it
    is and all weights on the GPU.

    Full speed is within `same_time` of such a choice that was timed on the same GPU, the one that would be taken with
    room for all of them. Where no such choice fits any card, any other may that was timed; of an estimate, which has no
    time, only one whose weights are all on the GPU.
    """
    buyable = [card for card in cards if _is_buyable(card)]
    roomy = sorted(buyable, key=lambda card: card.usable_bytes, reverse=True)
    known = [choice for choices in evidence.candidates(workload) for choice in choices]
    judged = [next((v for card in roomy if (v := judge(choice, card)).runs), None) for choice in known]
    running = [verdict for verdict in judged if verdict]
    plainly = any(verdict.outcome == "fits" and _is_plain(verdict.choice) for verdict in running)
    timed: dict[GpuKey, list[Verdict]] = {}  # by GPU: times of two GPUs say nothing of each other
    for verdict in running:
        if verdict.call_s is not None and (_is_plain(verdict.choice) or not plainly):
            timed.setdefault(verdict.choice.gpu_key, []).append(verdict)
    full_speed = {gpu: _fastest(verdicts).choice for gpu, verdicts in timed.items()}

    def comfortable(verdict: Verdict) -> bool:
        if verdict.outcome != "fits" or (plainly and not _is_plain(verdict.choice)):
            return False
        if verdict.call_s is None:
            return not verdict.choice.moves
        first = full_speed.get(verdict.choice.gpu_key, verdict.choice)
        return verdict.call_s <= same_time(verdict.choice, first) * (first.call_s or verdict.call_s)

    return _smallest(buyable, lambda card: best(workload, card, evidence, plainly=plainly), comfortable)


def _smallest(
    cards: Sequence[Card], verdict_on: Callable[[Card], Verdict], wanted: Callable[[Verdict], bool]
) -> Verdict | None:
    """The first wanted verdict, by memory on the box and then by how well known the card is."""
    by_size = sorted(cards, key=lambda card: (card.memory_gib, not card.headline, card.usable_bytes, card.name))
    return next(filter(wanted, (verdict_on(card) for card in by_size if _is_buyable(card))), None)


def _is_buyable(card: Card) -> bool:
    """Whether needs are known to hold for it, and its memory is its own."""
    return not card.memory_only and card.kind != "unified"


def largest(workloads: Iterable[Workload], card: Card, evidence: Evidence) -> tuple[Workload, Verdict] | None:
    """The last of these workloads, which come in rising order, that runs on the card, and its verdict."""
    verdicts = [(workload, best(workload, card, evidence)) for workload in workloads]
    return next(((workload, verdict) for workload, verdict in reversed(verdicts) if verdict.runs), None)

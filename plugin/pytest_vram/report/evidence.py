"""From records to evidence: for each workload and GPU the choices, each by its best record."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pytest_vram.cases.case import OwnCase
from pytest_vram.cases.models import Model
from pytest_vram.records.reading import ReadRun
from pytest_vram.report.choices import MOVES_ONCE, Choice, GpuKey, Workload, baseline, for_one_gpu, workload_of

MOST_LARGER = 200  # looked at for each workload; few models have so many
Sets = Mapping[tuple[str, ...], Choice]
_Found = dict[Workload, dict[GpuKey, dict[tuple[str, ...], list[Choice]]]]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What all runs together say.

    `choices` has, for each workload and each GPU, the choices by their set. `checks` are the measured cases that ran
    under a limit: what ran out of memory there counts against the choice, what completed for it. `failed` has what
    ended in no figures. `verdicts` keeps what was judged already.
    """

    runs: Sequence[ReadRun]
    choices: Mapping[Workload, Mapping[GpuKey, Sets]]
    checks: Sequence[Choice] = ()
    failed: Sequence[Choice] = ()
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    verdicts: dict[Hashable, dict[Workload, Any]] = field(default_factory=dict)

    @cached_property
    def subjects(self) -> Mapping[str, list[Workload]]:
        """The workloads of each model, and of each pipeline of one's own, in rising order."""
        found: dict[str, list[Workload]] = {}
        for workload in self.choices:
            found.setdefault(workload.subject, []).append(workload)
        return found

    @cached_property
    def _larger(self) -> dict[Workload, list[Workload]]:
        found = {}
        for workloads in self.subjects.values():
            for place, workload in enumerate(workloads, 1):
                found[workload] = [other for other in workloads[place : place + MOST_LARGER] if other.holds(workload)]
        return found

    def larger(self, workload: Workload) -> list[Workload]:
        """Of the next `MOST_LARGER` workloads those that are at least as much of the same, in rising order."""
        return self._larger[workload]

    @cached_property
    def _by_gpu(self) -> dict[Workload, list[list[Choice]]]:
        found = {}
        for workload, by_gpu in self.choices.items():
            groups = [list(sets.values()) for gpu, sets in by_gpu.items() if gpu is not None]
            groups.reverse()  # the last of equals first
            groups.sort(key=lambda choices: (sum(not c.estimated for c in choices), len(choices)), reverse=True)
            found[workload] = groups
        return found

    def by_gpu(self, workload: Workload) -> list[list[Choice]]:
        """The choices of each GPU that measured this workload, first of the one that searched most needs of it."""
        return self._by_gpu[workload]

    def measured(self, workload: Workload) -> list[Choice]:
        """The choices of the GPU that searched most needs of this workload; the last of equals."""
        return next(iter(self.by_gpu(workload)), [])

    @cached_property
    def _estimated(self) -> dict[Workload, list[Choice]]:
        found = {}
        for workload, by_gpu in self.choices.items():
            measured = {names for gpu, sets in by_gpu.items() if gpu is not None for names in sets}
            found[workload] = [choice for names, choice in by_gpu.get(None, {}).items() if names not in measured]
        return found

    def estimated(self, workload: Workload) -> list[Choice]:
        """The choices that were estimated with no GPU, and measured on none."""
        return self._estimated[workload]

    def tried(self, workload: Workload) -> list[Choice]:
        """Its choices, measured and estimated."""
        return [choice for sets in self.choices[workload].values() for choice in sets.values()]

    def speaks_of(self, choice: Choice) -> Choice | None:
        """What is known of the same set of the same workload: searched on its GPU, else on another, else estimated."""
        by_gpu = self.choices.get(choice.workload, {})
        known = [sets[choice.optimizations] for sets in by_gpu.values() if choice.optimizations in sets]
        return min(known, key=lambda one: (one.estimated, one.gpu_key != choice.gpu_key), default=None)

    @cached_property
    def gpus(self) -> list[str]:
        """The GPUs that something was measured on."""
        return sorted({c.gpu for groups in self._by_gpu.values() for choices in groups for c in choices if c.gpu})

    @cached_property
    def _candidates(self) -> dict[Workload, list[list[Choice]]]:
        found = {}
        for workload in self.choices:
            groups = self.by_gpu(workload)
            searched = {c.optimizations for choices in groups for c in choices if not c.estimated}
            for_one = [for_one_gpu(choices, searched) for choices in groups]
            known = [[c for c in choices if not c.estimated or c.optimizations not in searched] for choices in for_one]
            known.sort(key=lambda choices: all(choice.estimated for choice in choices))
            found[workload] = [*known, for_one_gpu(self.estimated(workload), searched)]
        return found

    def candidates(self, workload: Workload) -> list[list[Choice]]:
        """What may be taken for one card: the choices of each GPU, and the estimates, less those with a flag that was
        seen to change nothing where the set without it is there too, or its need was searched on another GPU. A GPU on
        which a need was not searched leaves the set to one on which it was; one left with no set whose need was
        searched comes after the others."""
        return self._candidates[workload]

    def groups(self, workload: Workload) -> list[tuple[Choice, list[Choice]]]:
        """The choices of each GPU, and the estimates, each group after the choice that it is compared with: a dtype
        alone of its own GPU, else that of all, of the GPU that searched most, or that searched that one."""
        groups = [choices for choices in (*self.by_gpu(workload), self.estimated(workload)) if choices]
        of_all = baseline([choice for choices in reversed(groups) for choice in choices])  # of one set the last counts
        of_all = self.speaks_of(of_all) or of_all
        own = [baseline(choices) for choices in groups]
        return [(of_all if one.flags or not one.gpu else one, found) for one, found in zip(own, groups, strict=True)]


def gather(runs: Sequence[ReadRun]) -> Evidence:
    """The evidence of these runs, oldest first.

    Where several records speak of the same set on such a GPU, a searched need beats a simulated one, that one beats
    none, and among equals the newest wins. The newest estimate of the same stands in for its own, if it has none or an
    older one; so it does for what ran on such a GPU under a limit alone.
    """
    found: _Found = {}
    order = {id(run): place for place, run in enumerate(runs)}
    checks, failed = [], []
    ran_out: dict[tuple[Workload, tuple[str, ...]], int] = {}
    completed: dict[tuple[Workload, tuple[str, ...]], int] = {}
    aliases: dict[str, Sequence[str]] = {}
    for run in runs:
        aliases |= run.run.aliases
        for record in run.records:
            choice = Choice(workload_of(record), record, run)
            limited = record.case.limit_bytes is not None
            if limited and record.method == "estimated":
                continue  # an estimate proves nothing of an estimate
            if record.status in ("error", "timeout", "skipped"):
                failed.append(choice)
            elif limited:
                checks.append(choice)
                key, limit = (choice.workload, choice.optimizations), record.case.limit_bytes or 0
                if record.status == "oom":
                    ran_out[key] = max(limit - (record.memory.context_bytes or 0), ran_out.get(key, 0))
                else:
                    completed[key] = min(limit, completed.get(key, limit))
            else:
                sets = found.setdefault(choice.workload, {}).setdefault(choice.gpu_key, {})
                sets.setdefault(choice.optimizations, []).append(choice)
    _add_checks(found, checks)
    choices: dict[Workload, dict[GpuKey, Sets]] = {}
    for workload, by_gpu in sorted(found.items()):
        for gpu, sets in by_gpu.items():
            chosen: dict[tuple[str, ...], Choice] = {}
            for names, several in sets.items():
                if one := _with_simulation(several, by_gpu.get(None, {}).get(names, []), order):
                    chosen[names] = replace(
                        one,
                        ran_out_bytes=ran_out.get((workload, names), 0),
                        completed_within=completed.get((workload, names)),
                    )
                else:
                    failed += several
            if chosen:
                mended = {names: replace(choice, unmoved=_unmoved(choice, chosen)) for names, choice in chosen.items()}
                choices.setdefault(workload, {})[gpu] = mended
    unknown: dict[str, Choice] = {}
    for choice in failed:
        known = any(choice.optimizations in sets for sets in choices.get(choice.workload, {}).values())
        if not known or choice.record.case.limit_bytes is not None:
            unknown[choice.record.id] = choice
    return Evidence(runs, choices, checks, list(unknown.values()), aliases)


def _add_checks(found: _Found, checks: Iterable[Choice]) -> None:
    """What a GPU ran under limits alone, where its need is simulated: of several the one with most room, the newest."""
    for check in sorted(checks, key=lambda check: check.record.case.limit_bytes or 0):
        by_gpu = found.setdefault(check.workload, {})
        sets = by_gpu.get(check.gpu_key, {})
        with_room = any(choice.record.case.limit_bytes is None for choice in sets.get(check.optimizations, ()))
        simulated = check.estimated or (check.need_bytes is None and check.optimizations in by_gpu.get(None, {}))
        if check.record.status == "ok" and simulated and not with_room:
            by_gpu.setdefault(check.gpu_key, {})[check.optimizations] = [check]


def _with_simulation(several: Sequence[Choice], estimates: Sequence[Choice], order: Mapping[int, int]) -> Choice | None:
    """The one of several that speaks of its set on a GPU, with the newest of the estimates if it has none or an older
    one; None where none can. `order` is the place of each run among all, by identity."""
    speak = [choice for choice in several if choice.need_bytes is not None or choice.at_least_bytes]
    on_gpu = any(c.run.gpu or c.run.gpu_memory_bytes for c in several)  # of the host nothing is simulated
    if not speak and on_gpu and estimates:
        ran = [choice for choice in several if choice.record.status == "ok"]
        speak = several = [replace(choice, simulated=estimates[-1]) for choice in ran]
    if not speak:
        return None
    one = _chosen(speak, several)
    later = [estimate for estimate in estimates if order[id(estimate.run)] > order[id(one.run)]]
    return replace(one, simulated=later[-1]) if later else one


def _unmoved(choice: Choice, others: Sets) -> Choice | None:
    """The timed set without model offload, if the choice has that; its VAE may work otherwise: steps are as long."""
    if MOVES_ONCE not in choice.optimizations:
        return None
    rest = tuple(name for name in choice.optimizations if name != MOVES_ONCE)
    denoiser = tuple(name for name in rest if not name.startswith("vae_"))
    timed = [other for names in (rest, denoiser) if (other := others.get(names)) and other.record.time.step_s]
    return next((other for other in timed if _software(other) == _software(choice)), None)


def _chosen(speak: Sequence[Choice], several: Sequence[Choice]) -> Choice:
    """Of the records of one set on one GPU, oldest first: the best of those that `speak`, with the times of all."""
    best = max(reversed(speak), key=lambda choice: (choice.need_bytes is not None, not choice.estimated))
    own = isinstance(best.record.case, OwnCase)  # whose code may have changed since
    others = [c for c in several if c is not best and not own and _software(c) == _software(best)]
    return replace(best, timed=tuple(others))


def _software(choice: Choice) -> tuple[object, ...]:
    return tuple(choice.run.run.environment.get(name) for name in ("torch", "diffusers", "driver"))


def lead(subject: str, evidence: Evidence, models: Mapping[str, Model]) -> Workload:
    """The workload by which a model is known: its native size and the smallest batch; else, of the smallest batch,
    the one with most choices, and the larger of equals."""
    native = models[subject].native if subject in models else None
    size = (native.width, native.height, native.frames or 0) if native else None

    def rank(workload: Workload) -> tuple[bool, int, int, int]:
        at_native = (workload.width, workload.height, workload.frames) == size
        several = max(map(len, evidence.choices[workload].values()))
        return at_native, -workload.batch_size, several, workload.pixels

    return max(evidence.subjects[subject], key=rank)

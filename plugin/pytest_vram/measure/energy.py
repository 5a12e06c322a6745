"""Energy of an image, from the GPU's own counter over rounds that ran one after the other."""

import statistics
from collections.abc import Sequence, Set

from pytest_vram.measure.machine import Machine
from pytest_vram.measure.runs import WorkerRun
from pytest_vram.measure.sampling import Batch

TRUSTED_S = 2.0  # the counter moves in steps: over less than this a difference means little
MOST_OF_THE_LIMIT = 1.5  # boards exceed their power limit for moments, and not on average


def joules_per_round(
    batches: Sequence[Sequence[Batch]], throttled: Set[int], power_limit_w: float | None
) -> tuple[float | None, str]:
    """Joules of one round on all GPUs of a case, over its longest batch with no throttled round; or None, and why.

    `batches` are those of each GPU, with the same rounds; `throttled` has the rounds to leave out.
    """
    together = [each for each in zip(*batches, strict=False) if all(batch.end > batch.first for batch in each)]
    clean = [each for each in together if not throttled & set(range(each[0].first, each[0].end))]
    if not clean:
        return None, "the GPU was throttled meanwhile" if together else "it was not counted"
    longest = max(clean, key=lambda each: each[0].seconds)
    seconds, rounds = longest[0].seconds, longest[0].end - longest[0].first
    if any(batch.began_mj is None and batch.ended_mj is None for batch in longest):
        return None, "the GPU has no energy counter that NVML tells (it has one from Volta on)"
    if any(batch.began_mj is None or batch.ended_mj is None for batch in longest):
        return None, "NVML did not tell the energy counter before and after the rounds"
    if seconds < TRUSTED_S:
        return None, f"the rounds took {seconds:.1f} s, and the counter means little over less than {TRUSTED_S:g} s"
    joules = [((batch.ended_mj or 0) - (batch.began_mj or 0)) / 1000 for batch in longest]
    if min(joules) <= 0:
        return None, "the GPU's energy counter did not move"
    watts = max(joules) / seconds
    if power_limit_w and watts > MOST_OF_THE_LIMIT * power_limit_w:
        return None, f"the counter says {watts:.0f} W, and the power limit is {power_limit_w:.0f} W"
    return sum(joules) / rounds, ""


def energy_per_image(machine: Machine, runs: Sequence[WorkerRun]) -> tuple[float | None, str]:
    """Joules of one image (of a video, as for `images_per_s`), the mean over the workers; or None, and why."""
    if machine.device == "cpu":
        return None, "the CPU has no such counter"
    if runs[-1].sampler.gpu is None:
        return None, machine.cannot.get("energy_j_per_image", "NVML was not sampled")
    if machine.facts.get("mig"):
        return None, "under MIG the counter is that of the whole GPU"
    if any(run.others for run in runs):
        return None, "other processes used the GPU meanwhile"
    images = runs[-1].outcome["images"]
    if images is None:
        return None, "it is not known how many images a call makes"
    limit_w = machine.facts.get("power_limit_w")
    found = []
    for run in runs:
        batches = [one.sampler.batches for one in (run, *run.peers)]
        joules, why = joules_per_round(batches, run.throttled, limit_w)
        if joules is None:
            return None, why
        found.append(joules)
    return statistics.fmean(found) / images, ""

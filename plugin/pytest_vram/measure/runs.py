"""What one worker reported, what was sampled of it meanwhile, and which of its rounds count."""

from dataclasses import dataclass, field

from pytest_vram.measure.channel import Message
from pytest_vram.measure.sampling import Sampler
from pytest_vram.records.schema import ABNORMAL, RoundTelemetry


@dataclass
class WorkerRun:
    """What one worker reported. `peers` are the same for the other GPUs that the case takes."""

    outcome: Message
    sampler: Sampler
    peers: "list[WorkerRun]" = field(default_factory=list)
    context: int | None = None
    output_tail: str = ""

    @property
    def done(self) -> bool:
        return self.outcome.get("event") == "done"

    @property
    def telemetry(self) -> list[RoundTelemetry]:
        """The state of the first GPU, round by round, with what throttled any."""
        each = [one.sampler.telemetry for one in (self, *self.peers)]
        return [
            states[0].model_copy(update={"throttle": sorted({name for state in states for name in state.throttle})})
            for states in zip(*each, strict=False)
        ]

    @property
    def throttled(self) -> set[int]:
        """The rounds in which a GPU was slowed down beyond its power cap."""
        return {number for number, state in enumerate(self.telemetry) if ABNORMAL & set(state.throttle)}

    @property
    def kept(self) -> list[dict[str, float]]:
        """Its rounds, without those of a throttled GPU, unless no other is left."""
        return self._kept(self.outcome.get("rounds", []))

    @property
    def kept_steps(self) -> list[dict[str, float]]:
        """Seconds of the denoiser's `first` call and of a `later` one, in those rounds."""
        return self._kept(self.outcome.get("steps", []))

    def _kept(self, each: list[dict[str, float]]) -> list[dict[str, float]]:
        throttled = self.throttled
        return [one for number, one in enumerate(each) if number not in throttled] or each

    @property
    def others(self) -> set[int]:
        """Processes that were seen beside it on its GPUs."""
        return {pid for one in (self, *self.peers) for pid in one.sampler.others}

"""What a call is cut into, on pipelines that do odd things."""

from typing import Any

import pytest
import torch

from pytest_vram.measure.generation import _Generation
from pytest_vram.measure.phases import Phases


class Vae(torch.nn.Module):
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class Pipe:
    def __init__(self) -> None:
        self.unet, self.vae = torch.nn.Linear(1, 1), Vae()

    def draw(self) -> None:
        self.vae.decode(self.unet(torch.zeros(1, 1)))


def test_each_call_begins_with_encode_whatever_the_last_one_did() -> None:
    entered: list[str] = []
    phases = Phases(Pipe(), "unet", entered.append)
    phases.begin()
    phases.begin()
    assert entered == ["encode", "encode"]


def test_a_second_denoiser_counts_too() -> None:
    pipe: Any = Pipe()
    pipe.unet_2 = torch.nn.Linear(1, 1)
    entered: list[str] = []
    phases = Phases(pipe, "unet", entered.append)
    phases.begin()
    for network in (pipe.unet, pipe.unet_2, pipe.unet_2):
        network(torch.zeros(1, 1))
    assert entered == ["encode", "denoise"]
    assert phases.denoiser_calls == 3


class Draws:
    """A call that draws so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def call(self, pipe: Pipe, place: str, steps: int | None) -> None:
        for _ in range(self.times):
            pipe.draw()


def generation_on(device: Any, draws: int = 1) -> tuple[Any, Pipe]:
    generation: Any = object.__new__(_Generation)
    generation.device, generation.subject, generation.place = device, Draws(draws), "cpu"
    generation.track_memory, generation.peaks, generation.phase, generation.lags = False, {}, "load", []
    pipe = Pipe()
    generation.phases = Phases(pipe, "unet", generation.enter, generation.queued)
    return generation, pipe


def test_the_seconds_of_a_phase_that_comes_again_are_added() -> None:
    # encode, then twice: denoiser, its return, decode; and the end
    generation, pipe = generation_on(Marks(1.0, 2.0, 2.5, 3.0, 4.0, 4.5, 5.0, 6.0), draws=2)
    assert generation.call(pipe) == {"encode": 1.0, "denoise": 2.0, "decode": 2.0}
    assert generation.phases.denoiser_calls == 2


class Marks:
    """A device whose marks pass at given seconds of its own clock."""

    def __init__(self, *passes: float) -> None:
        self.passes = iter(passes)

    def mark(self) -> float:
        return next(self.passes)

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def synchronize(self) -> None: ...

    def take_peak(self) -> None: ...


@pytest.mark.parametrize(
    ("passes", "lag"),
    [((0.0, 1.0, 5.0, 5.0, 6.0), 4.5), ((0.0, 1.0, 1.5, 1.5, 2.0), 1.0), ((0.0, 0.1, 0.2, 0.2, 0.3), -0.3)],
    ids=["far", "near", "before"],
)
def test_how_far_the_gpu_is_behind_when_the_denoiser_has_returned(
    passes: tuple[float, ...], lag: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.25, 0.5, 0.75, 1.0])  # of the host: call, denoiser, its return, decode, end
    monkeypatch.setattr("pytest_vram.measure.generation.time.perf_counter", lambda: next(clock))
    generation, pipe = generation_on(Marks(*passes))
    generation.call(pipe)
    assert generation.lags == [lag]

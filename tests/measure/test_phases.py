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


def test_a_network_returns_for_the_first_time_in_each_phase_of_denoising() -> None:
    pipe: Any = Pipe()
    pipe.unet_2 = torch.nn.Linear(1, 1)
    returned: list[bool] = []
    phases = Phases(pipe, "unet", lambda _: None, returned.append)
    zero = torch.zeros(1, 1)
    for _ in range(2):
        phases.begin()
        for network in (pipe.unet, pipe.unet, pipe.unet_2, pipe.unet_2):
            network(zero)
        pipe.vae.decode(zero)
        pipe.unet(zero)
    assert returned == [True, False, True, False, True] * 2


class Draws:
    """A call that draws so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def call(self, pipe: Pipe, place: str, steps: int | None) -> None:
        for _ in range(self.times):
            pipe.draw()


def generation_on(device: Any, draws: int = 1, denoisers: int = 1) -> tuple[Any, Any]:
    generation: Any = object.__new__(_Generation)
    generation.device, generation.subject, generation.place = device, Draws(draws), "cpu"
    generation.track_memory, generation.peaks, generation.phase = False, {}, "load"
    generation.lags, generation.steps = [], []
    pipe: Any = Pipe()
    if denoisers == 2:
        pipe.unet_2 = torch.nn.Linear(1, 1)
    generation.phases = Phases(pipe, "unet", generation.enter, generation.queued)
    return generation, pipe


def test_the_seconds_of_a_phase_that_comes_again_are_added() -> None:
    # encode, then twice: denoiser, its return, decode; and the end
    generation, pipe = generation_on(Marks(1.0, 2.0, 2.5, 3.0, 4.0, 4.5, 5.0, 6.0), draws=2)
    assert generation.call(pipe) == {"encode": 1.0, "denoise": 2.0, "decode": 2.0}
    assert generation.phases.denoiser_calls == 2


def steps_of(generation: Any, *networks: Any) -> Any:
    """What a call of these denoisers, one after the other, says of its steps."""
    generation.subject.call = lambda *_: [network(torch.zeros(1, 1)) for network in networks]
    generation.call(None)
    return generation.steps[-1]


def test_what_is_moved_for_the_first_step_counts_for_no_other() -> None:
    # encode until 1, weights until 11, then steps of 2 s
    generation, pipe = generation_on(Marks(0.0, 1.0, 13.0, 15.0, 17.0, 18.0))
    assert steps_of(generation, pipe.unet, pipe.unet, pipe.unet) == {"first": 12.0, "later": 2.0}


def test_nor_does_what_is_moved_for_a_second_denoiser() -> None:
    generation, pipe = generation_on(Marks(0.0, 1.0, 13.0, 15.0, 27.0, 30.0, 31.0), denoisers=2)
    assert steps_of(generation, pipe.unet, pipe.unet, pipe.unet_2, pipe.unet_2) == {"first": 12.0, "later": 2.5}


def test_of_one_step_nothing_is_known_of_a_later_one_and_of_none_nothing() -> None:
    generation, pipe = generation_on(Marks(0.0, 1.0, 13.0, 18.0, 20.0, 21.0))
    assert steps_of(generation, pipe.unet) == {"first": 12.0}
    assert steps_of(generation) == {}


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

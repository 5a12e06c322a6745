"""What a call is cut into, on pipelines that do odd things."""

from typing import Any

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


def test_the_seconds_of_a_phase_that_comes_again_are_added() -> None:
    class Clock:
        now = 0.0

        def mark(self) -> float:
            self.now += 1.0
            return self.now

        def seconds(self, begin: float, end: float) -> float:
            return end - begin

        def synchronize(self) -> None: ...

        def take_peak(self) -> None: ...

    class Twice:
        def call(self, pipe: Pipe, place: str, steps: int | None) -> None:
            pipe.draw()
            pipe.draw()

    generation: Any = object.__new__(_Generation)
    generation.device, generation.subject, generation.place = Clock(), Twice(), "cpu"
    generation.track_memory, generation.peaks, generation.phase = False, {}, "load"
    pipe = Pipe()
    generation.phases = Phases(pipe, "unet", generation.enter)
    assert generation.call(pipe) == {"encode": 1.0, "denoise": 2.0, "decode": 2.0}
    assert generation.phases.denoiser_calls == 2

"""One of each pipeline of the packaged models, and what a call of it with no data must do."""

import copy
import functools
import warnings
from typing import Any

import pytest
import torch

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import Model, read_models
from pytest_vram.measure import simulation
from pytest_vram.pipelines.build import assemble
from tests.pipelines.networks import network

MODELS = read_models()
CALLED: dict[str, Model] = {
    **{model.pipeline: model for model in reversed(MODELS.values())},  # one of each pipeline, and
    "a VAE of its own": MODELS["wan2.2-ti2v-5b"],
    "two denoisers": MODELS["wan2.2-t2v-a14b"],
}
HIDREAM = "HiDreamImagePipeline"  # makes about a megapixel whatever it is asked for; has a text for each of its blocks


def shallow(network: torch.nn.Module) -> torch.nn.Module:
    """A copy with no more than two of the blocks that a transformer repeats: the others take time and tell nothing."""
    whole = {
        name: blocks
        for name, blocks in network.named_children()
        if isinstance(blocks, torch.nn.ModuleList) and len({type(block) for block in blocks}) == 1 and len(blocks) > 4
    }
    for name, blocks in whole.items():
        setattr(network, name, blocks[:2])
    try:
        return copy.deepcopy(network)
    finally:
        for name, blocks in whole.items():
            setattr(network, name, blocks)


def check(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate goes through all phases and makes the size asked for."""
    made: list[Any] = []

    def watched(*args: Any, **attributes: Any) -> Any:
        pipe = assemble(*args, **attributes)
        call = type(pipe).__call__

        @functools.wraps(call)
        def calling(*args: Any, **kwargs: Any) -> Any:
            made.append(call(*args, **kwargs))
            return made[-1]

        monkeypatch.setattr(type(pipe), "__call__", calling)
        return pipe

    monkeypatch.setattr(simulation, "assemble", watched)
    copied = copy.deepcopy if model.pipeline == HIDREAM else shallow
    networks = iter([copied(network(part, torch.bfloat16)) for part in model.components.values()])
    monkeypatch.setattr(simulation, "build_component", lambda *_: next(networks))
    monkeypatch.setattr(simulation, "CALLS", 1)
    odd = 192 // model.resolution_multiple | 1  # times the multiple: no multiple of twice the multiple
    width, height = (times * model.resolution_multiple for times in (odd, odd + 2))
    frames = None if model.native.frames is None else 1 + model.frame_multiple
    case = Case(
        model=model.name,
        optimizations=("bf16",),
        height=height,
        width=width,
        frames=frames,
        batch_size=1,
        steps=2,
        guidance_scale=model.native.guidance_scale,
        sequence_length=model.native.sequence_length,
        scheduler=model.scheduler.class_name,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # Kandinsky 5's layer norms
        estimate = simulation.simulate(model, case)
    assert list(estimate.phases) == ["load", "encode", "denoise", "decode"]
    assert estimate.weights <= estimate.phases["load"] <= min(estimate.phases.values())
    assert max(estimate.phases.values()) == estimate.allocated_peak <= estimate.reserved_peak
    assert estimate.weights < estimate.need <= estimate.reserved_peak
    channels = 4 if model.name == "qwen-image-2.1" else 3  # its VAE makes transparency too
    expected = (1, channels, height, width) if frames is None else (1, frames, channels, height, width)
    shape = made[0].images.shape if frames is None else made[0].frames.shape
    if model.pipeline != HIDREAM:
        assert shape == expected

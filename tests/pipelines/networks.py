"""The networks of the packaged models, with no data."""

import contextlib
import functools

import torch

from pytest_vram.cases.models import Component
from pytest_vram.measure.trace import Trace
from pytest_vram.pipelines.build import build_component


def network(component: Component, dtype: torch.dtype) -> torch.nn.Module:
    """Built once for all models that have the same network."""
    return _network(component.model_copy(update={"parameters": None}).model_dump_json(), dtype)


@functools.cache
def _network(component: str, dtype: torch.dtype) -> torch.nn.Module:
    part = Component.model_validate_json(component, by_name=True)
    # under a trace, which slows all else, the large table of positions of SD3 costs nothing
    with torch.no_grad(), Trace() if part.class_name.startswith("SD3") else contextlib.nullcontext():
        return build_component(part, dtype)

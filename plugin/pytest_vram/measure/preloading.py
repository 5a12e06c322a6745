"""Imports before a fork: what they ask of the GPU meanwhile is answered by NVML."""

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from pytest_vram.measure import nvml


@contextlib.contextmanager
def cuda_untouched() -> Iterator[None]:
    """While it lasts torch.cuda says what a GPU is with no CUDA: torchao asks when it is imported, and once CUDA is
    initialised no forked child can use it. Without NVML nothing is changed."""
    try:
        gpus = nvml.gpus()
    except nvml.NvmlUnavailable:
        yield
        return
    import torch
    from torch.cuda._utils import _get_device_index as get_device_index

    importing = True
    properties, current = torch.cuda.get_device_properties, torch.cuda.current_device

    def get_device_properties(device: Any = None) -> Any:
        if not importing:  # somebody has kept this function
            return properties(device)
        gpu = gpus[_nvml_index(get_device_index(device, optional=True) or 0)]
        major, minor = gpu.compute_capability() or (0, 0)
        return SimpleNamespace(name=gpu.name, major=major, minor=minor, total_memory=gpu.total_bytes())

    def current_device() -> int:
        return 0 if importing else current()

    try:
        with patch.multiple(torch.cuda, get_device_properties=get_device_properties, current_device=current_device):
            yield
    finally:
        importing = False
        if dynamo := sys.modules.get("torch._dynamo.device_interface"):
            dynamo.caching_worker_device_properties.clear()  # which has more to say of a GPU than is said here


def _nvml_index(index: int) -> int:
    """NVML's number of a GPU that is visible to torch as this one."""
    import torch

    find = getattr(torch.cuda, "_get_nvml_device_index", None)
    return find(index) if find else index

"""Imports that ask for the GPU leave CUDA alone; the driver is played."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_vram.measure import nvml
from pytest_vram.measure.preloading import cuda_untouched


def gpu(name: str, capability: tuple[int, int] | None) -> Any:
    return SimpleNamespace(name=name, compute_capability=lambda: capability, total_bytes=lambda: 1 << 30)


@pytest.fixture
def initialised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What CUDA was initialised for, of a machine with two GPUs that torch sees the other way round."""
    calls: list[str] = []

    def initialises(name: str) -> Callable[..., Any]:
        def function(device: Any = None) -> Any:
            calls.append(name)
            return SimpleNamespace(name="real", major=1, minor=2) if name == "get_device_properties" else 1

        return function

    for name in ("get_device_properties", "current_device"):
        monkeypatch.setattr(torch.cuda, name, initialises(name))
    monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", lambda index: 1 - index, raising=False)
    monkeypatch.setattr(nvml, "gpus", lambda: [gpu("H100", (9, 0)), gpu("T4", (7, 5))])
    return calls


def test_what_imports_ask_does_not_initialise_cuda(initialised: list[str]) -> None:
    with cuda_untouched():
        assert torch.cuda.get_device_capability() == (7, 5)
        assert torch.cuda.get_device_capability(1) == (9, 0)
        assert torch.cuda.get_device_name("cuda:1") == "H100"
        assert torch.cuda.get_device_capability(torch.cuda.device(1)) == (9, 0)  # type: ignore[arg-type]  # bitsandbytes
        assert torch.cuda.get_device_properties(torch.device("cuda", 0)).total_memory == 1 << 30
        assert torch.cuda.current_device() == 0
    assert initialised == []


def test_afterwards_torch_answers_also_those_who_kept_the_function(initialised: list[str]) -> None:
    with cuda_untouched():
        kept, current = torch.cuda.get_device_properties, torch.cuda.current_device
    assert kept(0).name == torch.cuda.get_device_properties(0).name == "real"
    assert current() == 1
    assert initialised == ["get_device_properties", "get_device_properties", "current_device"]


def test_dynamo_asks_again(initialised: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dynamo = SimpleNamespace(caching_worker_device_properties={})
    monkeypatch.setitem(sys.modules, "torch._dynamo.device_interface", dynamo)
    with cuda_untouched():
        dynamo.caching_worker_device_properties["cuda"] = [torch.cuda.get_device_properties(0)]
    assert dynamo.caching_worker_device_properties == {}


def test_without_nvml_nothing_changes(initialised: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> Any:
        raise nvml.NvmlUnavailable("no driver")

    monkeypatch.setattr(nvml, "gpus", unavailable)
    with cuda_untouched():
        assert torch.cuda.get_device_properties(0).name == "real"


def test_a_failed_import_puts_everything_back(initialised: list[str]) -> None:
    before = torch.cuda.get_device_properties
    with pytest.raises(ImportError), cuda_untouched():
        raise ImportError("no torchao")
    assert torch.cuda.get_device_properties is before

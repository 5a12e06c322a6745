"""Offload with no GPU: which weights come and go, and when."""

from itertools import pairwise

import pytest
import torch

from pytest_vram.cases.models import Model
from pytest_vram.measure.trace import META, OneDevice, Trace
from pytest_vram.pipelines.offload import Unit, one_layer_at_a_time, one_network_at_a_time
from tests.measure.test_simulation import estimate, simulated

EMPTIED = (0, "empty_cache")


class Log:
    """A recorder that notes what it is told, by the names of the tensors."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.names = {id(tensor): name for name, tensor in (*network.named_parameters(), *network.named_buffers())}
        self.lines: list[str] = []

    def empty_cache(self) -> None:
        self.lines.append("empty")

    def on_host(self, tensor: torch.Tensor) -> None:
        self.lines.append(f"-{self.names[id(tensor)]}")

    def arrive(self, tensor: torch.Tensor) -> None:
        self.lines.append(f"+{self.names[id(tensor)]}")

    def news(self) -> str:
        """The lines since the last time."""
        lines, self.lines = self.lines, []
        return " ".join(lines)


def two_networks() -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in ("encoder", "vae")})


def test_a_network_comes_when_it_is_entered_and_sends_the_others_away() -> None:
    networks = two_networks()
    log, sample = Log(networks), torch.zeros(1, 4)
    came = one_network_at_a_time(dict(networks.items()), log)
    assert log.news() == "-encoder.weight -vae.weight", "all begin on the host"
    assert not came()
    networks["encoder"](sample)
    assert log.news() == "-encoder.weight -vae.weight empty +encoder.weight"
    networks["encoder"](sample)
    assert log.news() == "", "it is there already"
    networks["vae"](sample)
    assert log.news() == "-encoder.weight -vae.weight empty +vae.weight"
    assert came()


def test_a_method_that_asks_for_the_hook_brings_the_network_too() -> None:
    """diffusers looks for `_hf_hook` around a VAE's decode, which is no forward."""
    networks = two_networks()
    log = Log(networks)
    came = one_network_at_a_time(dict(networks.items()), log)
    log.news()
    hook: object = networks["vae"]._hf_hook
    assert getattr(hook, "pre_forward")(networks["vae"], 1, a=2) == ((1,), {"a": 2})  # noqa: B009
    assert log.news() == "-encoder.weight -vae.weight empty +vae.weight"
    assert came()


def test_a_layer_has_its_weights_for_its_own_forward_and_the_cache_is_emptied_when_they_have_come() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.BatchNorm1d(4, affine=False))
    log = Log(network.eval())
    came = one_layer_at_a_time({"network": network}, log)
    statistics = ["2.running_mean", "2.running_var", "2.num_batches_tracked"]
    assert log.news() == " ".join(["-0.weight -0.bias", *(f"+{name}" for name in statistics)])
    assert not came()
    for _ in range(2):
        network(torch.zeros(1, 4))
        first = ["+0.weight", "+0.bias", "empty", "-0.weight", "-0.bias"]
        assert log.news() == " ".join(first), "buffers stay"
    assert came()


def test_a_unit_takes_its_weights_once_and_gives_them_back_once() -> None:
    layer = torch.nn.Linear(64, 64, bias=False, device=META)
    with OneDevice(), Trace() as trace:
        unit = Unit([layer], trace)
        for _ in range(2):
            unit.load()
            unit.load()
            unit.drop()
            unit.drop()
        del layer, unit
    assert trace.events == [(1, 16384), (-1, 0), (2, 16384), (-2, 0)]


def test_a_tied_weight_comes_once() -> None:
    layers = [torch.nn.Linear(64, 64, bias=False, device=META) for _ in range(2)]
    layers[1].weight = layers[0].weight
    with OneDevice(), Trace() as trace:
        unit = Unit(layers, trace)
        unit.load()
        unit.drop()
    assert trace.events == [(1, 16384), (-1, 0)]


def test_a_weight_that_a_cast_replaces_while_it_is_loaded_leaves_with_its_unit() -> None:
    layer = torch.nn.Linear(64, 64, bias=False, dtype=torch.float16, device=META).requires_grad_(False)
    with torch.no_grad(), OneDevice(), Trace() as trace:
        unit = Unit([layer], trace)
        unit.load()
        layer.to(torch.float32)
        assert trace.live == 16384, "the float32 copy is there, and the float16 weight is gone"
        assert trace.peak == 8192 + 16384
        unit.drop()
        assert trace.live == 0
        unit.load()
        assert trace.live == 16384
        unit.drop()
    assert trace.events == [(1, 8192), (2, 16384), (-1, 0), (-2, 0), (3, 16384), (-3, 0)]


def test_a_weight_that_a_cast_replaces_on_the_host_comes_in_its_new_size() -> None:
    layer = torch.nn.Linear(64, 64, bias=False, dtype=torch.float16, device=META).requires_grad_(False)
    with torch.no_grad(), OneDevice(), Trace() as trace:
        unit = Unit([layer], trace)
        layer.to(torch.float32)
        assert trace.events == []
        unit.load()
        unit.drop()
    assert trace.events == [(1, 16384), (-1, 0)]


@pytest.mark.parametrize("offload", ["model_offload", "sequential_offload"])
def test_offload_is_simulated_the_same_each_time_and_takes_less(tiny: Model, offload: str) -> None:
    first, events = simulated(tiny, "fp32", offload)
    second, again = simulated(tiny, "fp32", offload)
    assert events == again
    assert first == second
    assert first.effects[offload] == "applied"
    whole = estimate(tiny, "fp32")
    assert first.allocated_peak < whole.allocated_peak
    assert first.phases["load"] < 64 << 10 < whole.weights < whole.phases["load"], "all begin on the host"


def test_model_offload_has_each_network_come_once_a_call(tiny: Model) -> None:
    _, events = simulated(tiny, "fp32", "model_offload")
    calls = 2
    assert events.count(EMPTIED) == calls * len(tiny.components)
    for event, after in pairwise(events):
        if event == EMPTIED:
            assert after[0] > 0, "a weight comes next"


def test_sequential_offload_empties_the_cache_after_each_load(tiny: Model) -> None:
    _, events = simulated(tiny, "fp32", "sequential_offload")
    assert events.count(EMPTIED) > 100
    for before, event in pairwise(events):
        if event == EMPTIED:
            assert before[0] > 0, "a weight has just come"

"""Offload with no GPU: which weights come and go, and when."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import group_offloading

from pytest_vram.cases.models import Model
from pytest_vram.errors import Inapplicable
from pytest_vram.measure.trace import META, OneDevice, Trace
from pytest_vram.pipelines.build import random_pipeline
from pytest_vram.pipelines.offload import (
    Unit,
    groups_at_a_time,
    one_layer_at_a_time,
    one_network_at_a_time,
    ungroupable,
)
from tests.measure.test_simulation import estimate, simulated

EMPTIED = (0, "empty_cache")


class Log:
    """A recorder that notes what it is told, by the names of the tensors."""

    gpu = 0

    def __init__(self, network: torch.nn.Module) -> None:
        self.names = {id(tensor): name for name, tensor in (*network.named_parameters(), *network.named_buffers())}
        self.lines: list[str] = []

    def empty_cache(self) -> None:
        self.lines.append("empty")

    def host(self) -> nullcontext[None]:
        return nullcontext()

    def side_stream(self, number: int) -> nullcontext[None]:
        return nullcontext()

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


def pipeline_of(networks: torch.nn.ModuleDict, order: str | None = "encoder->denoiser->vae", stay: str = "") -> Any:
    """What offload looks at in a pipeline."""
    return SimpleNamespace(
        components={"scheduler": None, **networks}, model_cpu_offload_seq=order, _exclude_from_cpu_offload=[stay]
    )


def test_a_network_comes_when_it_is_entered_and_sends_the_one_before_it_away() -> None:
    networks = two_networks()
    log, sample = Log(networks), torch.zeros(1, 4)
    pipe = pipeline_of(networks)
    came = one_network_at_a_time(pipe, log)
    assert log.news() == "-encoder.weight -vae.weight", "all begin on the host"
    assert not came()
    networks["encoder"](sample)
    assert log.news() == "+encoder.weight"
    networks["encoder"](sample)
    assert log.news() == "", "it is there already"
    networks["vae"](sample)
    assert log.news() == "-encoder.weight empty +vae.weight"
    networks["encoder"](sample)
    assert log.news() == "+encoder.weight", "out of order: nothing sends the VAE away"
    pipe.maybe_free_model_hooks()
    assert log.news() == "-encoder.weight -vae.weight empty", "the end of a call"
    assert came()


def test_a_network_out_of_the_order_sends_none_away_and_one_that_is_excluded_stays() -> None:
    networks = two_networks()
    log = Log(networks)
    came = one_network_at_a_time(pipeline_of(networks, order="encoder", stay="vae"), log)
    assert log.news() == "-encoder.weight -vae.weight +vae.weight"
    networks["encoder"](torch.zeros(1, 4))
    networks["vae"](torch.zeros(1, 4))
    assert log.news() == "+encoder.weight"
    assert came()
    one_network_at_a_time(pipeline_of(networks, order=None), log)
    assert log.news() == "-encoder.weight -vae.weight", "there is no order"


def test_a_method_that_asks_for_the_hook_brings_the_network_too() -> None:
    """diffusers looks for `_hf_hook` around a VAE's decode, which is no forward."""
    networks = two_networks()
    log = Log(networks)
    came = one_network_at_a_time(pipeline_of(networks), log)
    log.news()
    hook: object = networks["vae"]._hf_hook
    assert getattr(hook, "pre_forward")(networks["vae"], 1, a=2) == ((1,), {"a": 2})  # noqa: B009
    assert log.news() == "+vae.weight"
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


def test_model_offload_empties_the_cache_when_a_network_leaves_and_at_the_end_of_a_call(tiny: Model) -> None:
    _, events = simulated(tiny, "fp32", "model_offload")
    calls = 2
    assert events.count(EMPTIED) == calls * len(tiny.components)
    for before, event in pairwise(events):
        if event == EMPTIED:
            assert before[0] < 0, "a weight has just left"


def test_sequential_offload_empties_the_cache_after_each_load(tiny: Model) -> None:
    _, events = simulated(tiny, "fp32", "sequential_offload")
    assert events.count(EMPTIED) > 100
    for before, event in pairwise(events):
        if event == EMPTIED:
            assert before[0] > 0, "a weight has just come"


class Blocks(torch.nn.Module):
    """Three blocks, a layer before them, and a weight and a table of its own."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.first = torch.nn.Linear(size, size, bias=False)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(size, size, bias=False) for _ in range(3)])
        self.scale = torch.nn.Parameter(torch.ones(size))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        sample = self.first(sample) * self.scale
        for block in self.blocks:
            sample = block(sample)
        return sample


@pytest.fixture
def inputs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers' hooks would move to the GPU stays: outside of a simulation there is none to be seen."""
    monkeypatch.setattr(group_offloading, "send_to_device", lambda value, *_, **__: value)


@pytest.mark.parametrize(
    ("blocks", "forward"),
    [
        (1, "+F +S +0 -0 +1 -1 +2 -2 -F -S"),
        (2, "+F +S +0 +1 -0 -1 +2 -2 -F -S"),
        (9, "+F +S +0 +1 +2 -0 -1 -2 -F -S"),
    ],
)
@pytest.mark.usefixtures("inputs_stay")
def test_by_blocks_what_is_no_block_is_there_for_the_whole_forward(blocks: int, forward: str) -> None:
    network = Blocks()
    log = Log(network)
    came = groups_at_a_time({"network": network}, log, leaf=False, blocks=blocks)
    assert sorted(short(log.news()).split()) == ["-0", "-1", "-2", "-F", "-S"], "all begin on the host"
    assert not came()
    for _ in range(2):
        network(torch.zeros(1, 4))
        assert short(log.news()) == forward
    assert came()


@pytest.mark.usefixtures("inputs_stay")
def test_by_leaves_each_layer_has_its_weights_for_its_own_forward() -> None:
    network = Blocks()
    log = Log(network)
    groups_at_a_time({"network": network}, log, leaf=True)
    assert sorted(short(log.news()).split()) == ["-0", "-1", "-2", "-F", "-S"]
    for _ in range(2):
        network(torch.zeros(1, 4))
        assert short(log.news()) == "+S +F -F +0 -0 +1 -1 +2 -2 -S"


@pytest.mark.parametrize(
    ("leaf", "first", "next_ones"),
    [
        (False, "+F +S +0 -0 +1 -1 +2 -2 -F -S", "+F +S +0 +1 -0 +2 -1 -2 -F -S"),
        (True, "+S +F -F +0 -0 +1 -1 +2 -2 -S", "+S +F +0 -F +1 -0 +2 -1 -2 -S"),
    ],
)
@pytest.mark.usefixtures("inputs_stay")
def test_with_a_stream_a_group_comes_with_the_one_before_it_from_the_second_forward_on(
    leaf: bool, first: str, next_ones: str
) -> None:
    network = Blocks()
    log = Log(network)
    groups_at_a_time({"network": network}, log, leaf=leaf, blocks=1, stream=True)
    log.news()
    network(torch.zeros(1, 4))
    assert short(log.news()) == first, "the order is not known yet"
    for _ in range(2):
        network(torch.zeros(1, 4))
        assert short(log.news()) == next_ones


def short(lines: str) -> str:
    for name, letter in {"first.weight": "F", "scale": "S", "blocks.": "", ".weight": ""}.items():
        lines = lines.replace(name, letter)
    return lines


class Presence(Log):
    """Notes only what changes: the coming of a tensor that is away, the going of one that is there."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__(network)
        self.network, self.there, self.kept = network, set[str](), list[torch.Tensor]()

    def name(self, tensor: torch.Tensor) -> str:
        if id(tensor) not in self.names:  # a buffer's new tensor
            self.names |= Log(self.network).names
            self.kept.append(tensor)
        return self.names[id(tensor)]

    def arrive(self, tensor: torch.Tensor) -> None:
        if (name := self.name(tensor)) not in self.there:
            self.there.add(name)
            self.lines.append(f"+{name}")

    def on_host(self, tensor: torch.Tensor) -> None:
        if (name := self.name(tensor)) in self.there:
            self.there.remove(name)
            self.lines.append(f"-{name}")


def diffusers_own(network: torch.nn.Module, log: Presence, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """The group offload of diffusers itself, whose groups are watched: with a stream on a GPU that is pretended."""
    group = group_offloading.ModuleGroup
    offload = group.offload_

    def offload_noted(self: Any) -> None:
        modules = [tensor for module in self.modules for tensor in (*module.parameters(), *module.buffers())]
        for tensor in (*modules, *self.parameters, *self.buffers):
            log.on_host(tensor)
        offload(self)

    def away(self: Any) -> torch.device:
        weights = [weight for module in self.modules for weight in module.parameters()] + self.parameters
        return torch.device("meta" if weights and log.name(weights[0]) in log.there else "cpu")

    stream = SimpleNamespace(synchronize=lambda: None)
    gpu = SimpleNamespace(Stream=lambda: stream, stream=lambda _: nullcontext(), current_stream=lambda: stream)
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda _: gpu)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(group, "_transfer_tensor_to_device", lambda _, tensor, *__: log.arrive(tensor))
    monkeypatch.setattr(group, "offload_", offload_noted)
    monkeypatch.setattr(group, "offload_device", property(away, lambda *_: None), raising=False)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    apply = getattr(network, "enable_group_offload", None)
    if apply is None:
        group_offloading.apply_group_offloading(network, META, **options)
    else:
        apply(META, **options)


def transformer() -> tuple[Any, Callable[[Any], object]]:
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=3,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    sample, prompt, time = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8), torch.zeros(1)
    added = {"resolution": None, "aspect_ratio": None}
    return network, lambda it: it(sample, prompt, timestep=time, added_cond_kwargs=added)


def part_of(tiny: Model, name: str) -> tuple[Any, Callable[[Any], object]]:
    network = getattr(random_pipeline(tiny, torch.float32, "cpu"), name)
    if name == "unet":
        prompt = torch.zeros(1, 77, network.config.cross_attention_dim)
        return network, lambda it: it(torch.zeros(1, 4, 8, 8), torch.zeros(1), prompt)
    if name == "vae":
        return network, lambda it: it.decode(torch.zeros(1, 4, 8, 8))
    return network, lambda it: it(torch.zeros(1, 77, dtype=torch.long))


@pytest.mark.parametrize("name", ["transformer", "unet", "vae", "text_encoder"])
@pytest.mark.parametrize("options", [("leaf_level", 1), ("block_level", 1), ("block_level", 2)], ids=str)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.usefixtures("inputs_stay")
def test_weights_come_and_go_as_under_diffusers_own_hooks(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, name: str, options: tuple[str, int], stream: bool
) -> None:
    kind, blocks = options
    found: list[list[str]] = []
    for real in (True, False):
        torch.manual_seed(0)
        network, call = transformer() if name == "transformer" else part_of(tiny, name)
        log = Presence(network)
        with monkeypatch.context() as patch, torch.no_grad():
            if real:
                arguments = {"offload_type": kind, "num_blocks_per_group": blocks, "use_stream": stream}
                diffusers_own(network, log, patch, low_cpu_mem_usage=True, **arguments)
            else:
                leaf = kind == "leaf_level"
                groups_at_a_time({name: network}, log, leaf=leaf, blocks=blocks, stream=stream)
            for _ in range(3):
                log.lines.append("call")
                call(network)
        found.append(in_any_order_where_they_go(log.lines))
    assert len(found[0]) > 30
    assert found[0] == found[1]


def in_any_order_where_they_go(lines: Iterable[str]) -> list[str]:
    """Those that go together sorted: their order makes no difference to the memory."""
    out: list[str] = []
    going: list[str] = []
    for line in (*lines, ""):
        if line.startswith("-"):
            going.append(line)
        else:
            out += [*sorted(going), line]
            going = []
    return out[:-1]


def test_each_network_has_a_stream_of_its_own_as_diffusers_makes_one_for_each() -> None:
    with torch.device(META):
        networks = {name: Blocks(size=64).requires_grad_(False) for name in ("encoder", "denoiser")}
    with torch.no_grad(), OneDevice(), Trace() as trace:
        groups_at_a_time(networks, trace, leaf=True, stream=True)
        for network in networks.values():
            trace.enter("network")
            network(torch.zeros(1, 64, device=META))
    layer, stream, taken = 64 * 64 * 4, 0, []
    for number, value in trace.events:
        if isinstance(value, str) and value.startswith("stream:"):
            stream = int(value[-1])
        elif isinstance(value, str):
            taken.append(value)
        elif number > 0:
            taken.append(f"{stream}" if value == layer else "")
    first, second = " ".join(taken).removeprefix("enter:network").split("enter:network")
    assert set(first.split()) == {"1"}
    assert set(second.split()) == {"2"}


def test_two_groups_are_there_at_once_with_a_stream_and_one_without() -> None:
    for stream, there in ((False, 1), (True, 2)):
        with torch.device(META):
            network = Blocks(size=64).requires_grad_(False)
        with torch.no_grad(), OneDevice(), Trace() as trace:
            groups_at_a_time({"network": network}, trace, leaf=True, stream=stream)
            weights = [size for number, size in trace.events if number > 0]
            assert weights == []
            sample = torch.zeros(1, 64, device=META)
            for _ in range(2):
                network(sample)
        layer = 64 * 64 * 4
        live = peak = 0
        sizes: dict[int, int] = {}
        for number, size in trace.events:
            if number > 0 and size == layer:
                sizes[number], live = layer, live + 1
            elif -number in sizes:
                live -= 1
            peak = max(peak, live)
        assert (live, peak) == (0, there)


def test_the_buffers_of_what_is_no_block_are_there_twice_after_the_first_forward() -> None:
    """Module.to() replaces a buffer by its copy, and the group goes on to move the one that it knew."""
    with torch.device(META):
        network = torch.nn.ModuleDict({"table": torch.nn.Module()})
        network["table"].register_buffer("rows", torch.zeros(1 << 10))
    peaks = []
    with OneDevice(), Trace() as trace:
        network.forward = lambda: peaks.append(trace.live)
        groups_at_a_time({"network": network}, trace, leaf=False)
        for _ in range(3):
            network()
            assert trace.live == 0
    assert peaks == [4096, 8192, 8192]


def test_networks_that_are_excluded_come_at_once_and_stay() -> None:
    networks = two_networks()
    log = Log(networks)
    groups_at_a_time(dict(networks.items()), log, leaf=True, exclude=["vae"])
    assert log.news() == "-encoder.weight +vae.weight"


@pytest.mark.usefixtures("inputs_stay")
def test_a_stream_brings_the_weights_from_before_a_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"offload_type": "leaf_level", "use_stream": True, "low_cpu_mem_usage": True}
    network, sample = Blocks(), torch.zeros(1, 4, dtype=torch.float64)
    with monkeypatch.context() as patch:
        diffusers_own(network, Presence(network), patch, **options)
        network.double()(sample)
    assert network.first.weight.dtype == torch.float32, "diffusers' pinned copy is back"
    network = Blocks()
    groups_at_a_time({"network": network}, Presence(network), leaf=True, stream=True)
    with pytest.raises(Inapplicable, match="undoes the cast"):
        network.double()(sample)


@pytest.mark.usefixtures("inputs_stay")
def test_diffusers_leaves_what_no_forward_enters_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    vae: Any = diffusers.AutoencoderTiny().eval()
    log = Presence(vae)
    with monkeypatch.context() as patch:
        diffusers_own(vae, log, patch, offload_type="block_level", num_blocks_per_group=1)
        vae.decode(torch.zeros(1, 4, 8, 8))
    assert log.lines == [], "nothing has come"
    layer = torch.nn.TransformerEncoderLayer(8, 2)
    log = Presence(layer)
    with monkeypatch.context() as patch:
        diffusers_own(layer, log, patch, offload_type="leaf_level")
        layer(torch.zeros(1, 3, 8))
    assert "+self_attn.in_proj_weight" in log.lines
    assert "+self_attn.out_proj.weight" not in log.lines


def test_networks_that_would_fail_are_refused() -> None:
    with torch.device(META):
        tiny_vae, vae = diffusers.AutoencoderTiny(), diffusers.AutoencoderKL()
        attention = torch.nn.TransformerEncoderLayer(8, 2)
        never = diffusers.VQModel(norm_num_groups=32)
    assert ungroupable(never, leaf=True) == "VQModel does not support group offload"
    assert ungroupable(tiny_vae, leaf=True) is None
    assert "decode" in (ungroupable(tiny_vae, leaf=False) or "")
    assert ungroupable(vae, leaf=False) is None
    assert ungroupable(attention, leaf=False) is None
    assert "out_proj" in (ungroupable(attention, leaf=True) or "")
    networks = {"vae": tiny_vae}
    with pytest.raises(Inapplicable, match="AutoencoderTiny does not support group offload by blocks"):
        groups_at_a_time(networks, Log(tiny_vae), leaf=False)
    assert not groups_at_a_time(networks, Log(tiny_vae), leaf=False, exclude=["vae"])()

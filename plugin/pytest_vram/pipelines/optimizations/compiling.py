"""The denoiser compiled by torch.compile, in its default mode: no autotuning of matrix products, no CUDA graphs."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_vram.errors import Inapplicable
from pytest_vram.pipelines.optimizations.base import Optimization, Seen, denoisers

if TYPE_CHECKING:
    import torch

    from pytest_vram.pipelines.offload import Recorder


class _Compiled(Optimization):
    """As one graph: what would break it is an error there, so that nothing runs eagerly unseen.

    It excludes what works by hooks on the layers, which break the graph at each of them: diffusers documents group
    offload with a graph in pieces, compiled anew for every block, and says nothing of layerwise casting and caches.
    """

    one_of = "compilations"
    excludes = frozenset({
        "layerwise_casting", "caches", "sequential_offload",
        "group_offload_block", "group_offload_leaf", "group_offload_block_stream", "group_offload_leaf_stream",
        "group_offload_block_disk", "group_offload_leaf_disk",
    })  # fmt: skip
    backend: ClassVar[str] = "inductor"

    def apply(self, pipe: Any, denoiser: str) -> None:
        for network in denoisers(pipe, denoiser):
            regions = self.regions(network)
            self.compile(network)
            network.forward = _one_graph(self.name, network, regions)

    def regions(self, network: Any) -> "list[torch.nn.Module]":
        """Whose calls are compiled.

        Raises:
            Inapplicable: when there are none.
        """
        raise NotImplementedError

    def compile(self, network: Any) -> None:
        """Have its code compiled when it is called."""
        raise NotImplementedError

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        """That a graph was compiled, and none broken; where compilation is turned off there is none."""
        from torch._dynamo.utils import counters

        def count() -> tuple[int, int]:
            return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

        graphs, breaks = count()
        return lambda: count()[0] > graphs and count()[1] == breaks

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        for network in denoisers(pipe, denoiser):
            self.regions(network)
        return lambda: True  # the estimate is that of the network as it is


class Compile(_Compiled):
    name = "compile"
    call = "pipe.transformer.compile(fullgraph=True)"
    summary = "the denoiser compiled as a whole by torch.compile: the most is fused, and compiling takes longest"

    def regions(self, network: Any) -> "list[torch.nn.Module]":
        return list(network.children())

    def compile(self, network: Any) -> None:
        """What `network.compile(fullgraph=True)` compiles, but for hooks on the network itself: those of offloads and
        phases stay around it."""
        import torch

        network.forward = torch.compile(network.forward, fullgraph=True, backend=self.backend)


class CompileBlocks(_Compiled):
    name = "compile_blocks"
    call = "pipe.transformer.compile_repeated_blocks(fullgraph=True)"
    summary = "the denoiser's repeated blocks compiled by torch.compile, once for all that are alike"

    def regions(self, network: Any) -> "list[torch.nn.Module]":
        names = getattr(network, "_repeated_blocks", None) or ()
        blocks = [module for module in network.modules() if type(module).__name__ in names]
        if not blocks:
            raise Inapplicable(f"{self.name}: diffusers names no repeated blocks of {type(network).__name__}")
        return blocks

    def compile(self, network: Any) -> None:
        network.compile_repeated_blocks(fullgraph=True, backend=self.backend)


def _one_graph(flag: str, network: Any, regions: "list[torch.nn.Module]") -> Callable[..., Any]:
    """The network's forward, in which a broken graph is a reason to skip the case."""
    from torch._dynamo.exc import Unsupported

    forward = network.forward
    first = True

    @wraps(forward)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        nonlocal first
        if first:
            first = False
            _note_while_tracing(regions)
        try:
            return forward(*args, **kwargs)
        except Unsupported as error:
            why = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise Inapplicable(f"{flag}: {type(network).__name__} is no single graph: {why}") from None

    return compiled


def _note_while_tracing(regions: "list[torch.nn.Module]") -> None:
    """Let the hooks with which other flags look on run while what they are in is traced, and then no more.

    Compiled they would be part of the graph, and what they note a guard: each call would be compiled anew. For the same
    reason their number stays, even where one removes itself.
    """
    for module in dict.fromkeys(module for region in regions for module in region.modules()):
        for hooks, register in (
            (module._forward_pre_hooks, module.register_forward_pre_hook),
            (module._forward_hooks, module.register_forward_hook),
        ):
            for key, hook in tuple(hooks.items()):
                if getattr(hook, "__module__", "").startswith("pytest_vram."):
                    del hooks[key]
                    register(_traced(hook, module))


def _traced(hook: Callable[..., Any], module: "torch.nn.Module") -> Callable[..., None]:
    import torch
    from torch._dynamo.comptime import comptime

    def note(context: Any) -> None:
        output = context.get_local("output")
        hook(module, (), *([output.as_fake()] if issubclass(output.python_type(), torch.Tensor) else []))

    def traced(_: Any, __: Any, output: Any = None) -> None:
        comptime(note)

    return traced


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process, by its own clock: tracing, generating code and compiling it
    (`entire_frame_compile`), and choosing among a kernel's variants when it first runs. The cold call less a warm one
    would be more: all that any first call does is in it."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return 0.0
    spent = utils.calculate_time_spent()
    return float(spent.get("total_wall_time", 0.0) + spent.get("CachingAutotuner.benchmark_all_configs", 0.0))

"""What an optimization is, and what several of them use."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_vram.errors import Inapplicable

if TYPE_CHECKING:
    import torch

    from pytest_vram.pipelines.offload import Recorder

Seen = Callable[[], bool]
OFFLOAD_FOLDER = "PYTEST_VRAM_OFFLOAD_FOLDER"  # an environment variable of workers


class Optimization:
    """One flag. The defaults are those of a flag that changes the finished pipeline and nothing else."""

    name: ClassVar[str]
    call: ClassVar[str]  # as people write it themselves
    summary: ClassVar[str]
    package: ClassVar[str] = ""  # that it needs beside diffusers, as pip names it
    excludes: ClassVar[frozenset[str]] = frozenset()  # flags, or what they are one of
    one_of: ClassVar[str | None] = None  # of the flags that are one of the same a case has one
    dtype: ClassVar[str | None] = None
    environ: ClassVar[Mapping[str, str]] = {}
    offloads: ClassVar[bool] = False  # weights start in host memory; `at_once` names exceptions
    on_disk: ClassVar[bool] = False  # weights are in files in the folder that `OFFLOAD_FOLDER` names
    needs_gpu: ClassVar[bool] = False
    trained: ClassVar[bool] = False  # decides by the values it sees: needs trained weights, and cannot be estimated
    replaces: ClassVar[bool] = False  # puts a network with weights of its own in place of another
    gpus: ClassVar[int] = 1  # that one case takes
    processes: ClassVar[bool] = False  # a process for each of them
    exact: ClassVar[bool] = False  # claims to leave the image as it is

    def prepare(self, networks: "dict[str, torch.nn.Module]", denoiser: str) -> "Callable[[Any], None] | None":
        """Change the networks, or put others in their place, before they have weights on the GPU. The result is called
        with each of their modules when it has its own, before the next one has.

        Raises:
            Inapplicable: when this pipeline cannot take it.
        """

    def at_once(self, networks: Iterable[str]) -> set[str]:
        """Where the flag offloads: of these networks those that go to the GPU all the same, before it is applied."""
        return set()

    def gpu_of(self, networks: "Mapping[str, torch.nn.Module]") -> Mapping[str, int]:
        """The GPU of each network, where the flag spreads them over several."""
        return {}

    def apply(self, pipe: Any, denoiser: str) -> None:
        """Change the pipeline, whose networks are in place.

        Raises:
            Inapplicable: when this pipeline cannot take it.
        """

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        """Look on from before the first call; the result says afterwards whether the flag took effect."""
        raise NotImplementedError

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        """What `apply` and `watch` do, on a pipeline of meta tensors whose memory `recorder` records."""
        self.apply(pipe, denoiser)
        return self.watch(pipe, denoiser)


def taken(owner: Any, name: str) -> Any:
    """This method or part, which not every class has.

    Raises:
        Inapplicable: naming the class that lacks it.
    """
    found = getattr(owner, name, None)
    if found is None:
        raise Inapplicable(f"{type(owner).__name__} has no {name}")
    return found


def denoisers(owner: Any, name: str) -> list[Any]:
    """The denoiser of a pipeline, or of networks by name; some have a second one, for the steps with less noise."""
    parts = owner if isinstance(owner, dict) else {part: getattr(owner, part, None) for part in (name, f"{name}_2")}
    return [network for part in (name, f"{name}_2") if (network := parts.get(part)) is not None]


def batches_of(module: Any, method: str) -> list[int]:
    """The batch size of every call of `module.method` from now on."""
    batches: list[int] = []
    original = getattr(module, method, None)

    def noting(sample: "torch.Tensor", *args: Any, **kwargs: Any) -> Any:
        batches.append(sample.shape[0])
        return original(sample, *args, **kwargs)  # type: ignore[misc]

    if original is not None:
        setattr(module, method, noting)
    return batches

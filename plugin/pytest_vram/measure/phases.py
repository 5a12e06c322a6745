"""Where a call of a pipeline passes from one phase to the next: encode, denoise, decode."""

from collections.abc import Callable
from typing import Any

from pytest_vram.pipelines.optimizations.base import denoisers

Enter = Callable[[str], None]
Queued = Callable[[bool], None]


class Phases:
    """Calls `enter(name)` when the call begins, at the denoiser's first forward and at the VAE's decode, and
    `queued(first)` whenever the denoiser returns: then the host has queued its kernels, and the GPU may still run them.
    `first` says that this network had not run before in this phase: an offload may have brought its weights for it.

    The three phases leave no gap: what the pipeline does between them belongs to the one that went before.
    """

    def __init__(
        self, pipe: Any, denoiser: str, enter: Enter, queued: Queued = lambda _: None, decoder: str = "vae"
    ) -> None:
        self._enter, self._queued = enter, queued
        self._returned: set[Any] = set()  # networks, since the denoiser's phase began
        self.current = "load"
        self.denoiser_calls = 0  # of the call that goes on, or went last
        for part in denoisers(pipe, denoiser):
            # first of all hooks, so that what offloading moves for the denoiser belongs to its phase
            part.register_forward_pre_hook(lambda *_: self._denoise(), prepend=True)
            part.register_forward_hook(lambda part, *_: self._return(part))
        network = getattr(pipe, decoder)
        decode = network.decode

        def decoding(*args: Any, **kwargs: Any) -> Any:
            self._once("decode")
            return decode(*args, **kwargs)

        network.decode = decoding

    def begin(self) -> None:
        """A call of the pipeline begins."""
        self.denoiser_calls = 0
        self.current = "encode"
        self._enter("encode")

    def _denoise(self) -> None:
        self.denoiser_calls += 1
        self._once("denoise")

    def _return(self, part: Any) -> None:
        first = part not in self._returned
        self._returned.add(part)
        self._queued(first)

    def _once(self, name: str) -> None:
        if name != self.current:
            self.current = name
            self._returned.clear()
            self._enter(name)


class WholeCall:
    """A pipeline of a form that is not known: all of a call is one phase, `call`."""

    denoiser_calls = 0

    def __init__(self, enter: Enter) -> None:
        self._enter = enter

    def begin(self) -> None:
        """A call begins."""
        self._enter("call")

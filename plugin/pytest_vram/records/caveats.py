"""What a machine's GPU memory is like, where the figures of a run mean something else than on other machines."""

from collections.abc import Mapping
from typing import Any

UNIFIED = "GPU and host share one memory"
SPILLS = "Windows may move GPU memory to the host"


def caveats(environment: Mapping[str, Any]) -> dict[str, str]:
    """For the environment of a run what must be said of its figures: in short, and why it matters."""
    found = {}
    if environment.get("unified_memory") is True:
        found[UNIFIED] = (
            "required counts what is on the GPU's side alone, host_peak_bytes comes out of the same memory, and NVML "
            "may tell none of it"
        )
    if environment.get("spills"):
        found[SPILLS] = (
            "a case that takes more than the card has may go on slowly where it would run out of memory elsewhere. "
            "Figures near the card's memory, the need among them, may not be believed, unless the CUDA Sysmem Fallback "
            "Policy in the NVIDIA Control Panel prefers no fallback"
        )
    return found

"""The names by which CUDA is told to use one GPU, from NVML: CUDA itself is not asked, nor initialised."""

import os
from collections.abc import Mapping

from pytest_vram.errors import UsageError
from pytest_vram.measure import nvml
from pytest_vram.measure.locking import chosen_gpus

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_uuids(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The uuids of the GPUs, or MIG instances, that CUDA would use.

    Raises:
        UsageError: without a driver, or where it is not certain which they are.
    """
    try:
        gpus = nvml.gpus()
    except nvml.NvmlUnavailable as error:
        raise UsageError(f"--gpu: {error}; leave --gpu out for the estimate, or see `pytest-vram doctor`") from error
    visible = environ.get(VARIABLE)
    if visible is None:
        chosen = gpus
    else:
        numbers = any(entry.strip().isdecimal() for entry in visible.split(","))
        if numbers and len({gpu.name for gpu in gpus}) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            raise UsageError(
                f"-n: {VARIABLE}={visible} has numbers of different GPUs, and CUDA has an order of its own: "
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or write the uuids that `nvidia-smi -L` shows"
            )
        chosen = chosen_gpus(gpus, visible, None)
    uuids = [gpu.uuid() for gpu in chosen]
    if None in uuids:
        raise UsageError("-n: NVML does not tell the uuids by which the GPUs are told apart; leave -n out")
    return list(dict.fromkeys(uuid for uuid in uuids if uuid))

"""Which GPUs CUDA would use, told from NVML and the environment: CUDA itself is not asked, nor initialised."""

import os
from collections.abc import Mapping, Sequence

from pytest_vram.errors import UsageError
from pytest_vram.measure import nvml

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_uuids(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs, or MIG instances, that CUDA would use, each by the name under which the variable takes it.

    Raises:
        UsageError: without a driver, or where it is not certain which they are.
    """
    try:
        gpus = nvml.gpus()
    except nvml.NvmlUnavailable as error:
        raise UsageError(f"--gpu: {error}; leave --gpu out for the estimate, or see `pytest-vram doctor`") from error
    if environ.get(VARIABLE) is None:
        return _uuids(gpus)
    return list(dict.fromkeys(_chosen(gpus, environ[VARIABLE], environ.get("CUDA_DEVICE_ORDER"))))


def _chosen(gpus: Sequence[nvml.Gpu], visible: str, order: str | None) -> list[str]:
    """As CUDA reads the variable: numbers or (beginnings of) uuids, up to the first that is neither."""
    uuids = _uuids(gpus)
    chosen: list[str] = []
    for entry in (entry.strip() for entry in visible.split(",")):
        if entry.isdecimal():
            if len({gpu.name for gpu in gpus}) > 1 and order != "PCI_BUS_ID":
                raise UsageError(
                    f"-n: {VARIABLE}={visible} has numbers of different GPUs, and CUDA has an order of its own: "
                    "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or write the uuids that `nvidia-smi -L` shows"
                )
            found = uuids[int(entry) : int(entry) + 1]
        elif entry.startswith("MIG-"):
            found = [entry]
        else:
            found = [uuid for uuid in uuids if entry and uuid.startswith(entry)][:1]
        if not found:
            break
        chosen += found
    return chosen


def _uuids(gpus: Sequence[nvml.Gpu]) -> list[str]:
    uuids = [gpu.uuid() for gpu in gpus]
    if None in uuids:
        raise UsageError("-n: NVML does not tell the uuids by which the GPUs are told apart; leave -n out")
    return [uuid for uuid in uuids if uuid is not None]

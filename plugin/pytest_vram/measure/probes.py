"""Small worker tasks: the canary that tries CUDA in a worker, the check of architectures, the estimate of one case."""

import resource
import sys
from dataclasses import asdict
from typing import Any

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import Model
from pytest_vram.errors import Inapplicable
from pytest_vram.measure.channel import Message
from pytest_vram.measure.worker import Reporter

# Parameters are made in host memory one by one and dropped at once, untouched; the largest of a packaged model, the
# embeddings of UMT5 in fp32, takes 4 GiB.
LEAST_ROOM_BYTES = 16 << 30


def canary(job: Message, reporter: Reporter) -> None:
    """Initialise CUDA, load the kernels that every pipeline uses, and tell what GPU this is."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "no GPU answers" if built else f"torch {torch.__version__} is built for the CPU"
        reporter.ask("unavailable", message=why)
        return
    properties = torch.cuda.get_device_properties(0)
    for dtype in (torch.float16, torch.float32):
        sample = torch.zeros(1, 64, 64, 64, device="cuda", dtype=dtype)
        convolved = torch.nn.functional.conv2d(sample, torch.zeros(64, 64, 3, 3, device="cuda", dtype=dtype), padding=1)
        normalized = torch.nn.functional.group_norm(convolved, 32)
        tokens = normalized.reshape(1, 1, 64 * 64, 64)
        torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens) @ tokens.transpose(-1, -2)
    torch.cuda.synchronize()
    reporter.ask(
        "available",
        name=properties.name,
        memory_bytes=properties.total_memory,
        integrated=bool(properties.is_integrated),
        uuid=str(properties.uuid),
        uuids=[str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(torch.cuda.device_count())],
        capability=f"{properties.major}.{properties.minor}",
        cuda=torch.version.cuda or torch.version.hip,
        cudnn=str(torch.backends.cudnn.version()),
        reserved_bytes=torch.cuda.memory_reserved(),
    )


def bound_host_memory(room_bytes: int | None = None) -> None:
    """An architecture that asks for more than `room_bytes` beyond what this process holds ends in an error, and not in
    a host without memory. Without a figure it is what the host has available, and at least `LEAST_ROOM_BYTES`."""
    import psutil

    room = max(LEAST_ROOM_BYTES, psutil.virtual_memory().available) if room_bytes is None else room_bytes
    if sys.platform == "linux":  # elsewhere the limit is not kept
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = psutil.Process().memory_info().data + room
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def check_models(job: Message, reporter: Reporter) -> None:
    """Tell what of these architectures cannot be built, by the model's file or name, or None."""
    from pytest_vram.pipelines.build import architecture_problem

    bound_host_memory()
    problem = None
    for document in job["models"]:
        model = Model.model_validate(document)
        if problem is None and (found := architecture_problem(model)):
            problem = f"{model.source or model.name}: {found}"
    reporter.ask("done", problem=problem)


def estimate(job: Message, reporter: Reporter) -> None:
    """Simulate one case, on one thread: its real tensors are tiny, and idle threads of a pool would spin."""
    import torch

    from pytest_vram.measure.simulation import simulate

    torch.set_num_threads(1)
    bound_host_memory()
    model, case = Model.model_validate(job["model"]), Case.model_validate(job["case"])
    arguments = {"capability": float(job["capability"])} if job.get("capability") else {}
    try:
        result: dict[str, Any] = asdict(simulate(model, case, **arguments))
    except Inapplicable as error:
        reporter.ask("skipped", message=str(error))
    else:
        reporter.ask("done", **result)

"""What flags do to the image: the output of a case against that of the same case with its dtype alone."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pytest_vram.cases.case import Case
from pytest_vram.pipelines.optimizations import chosen, plain

Make = Callable[[Case, Path, bool], str | None]
"""Runs a case once and keeps its output in a file; the flag says whether its weights are made in host memory. The
result is what went wrong, or None."""


class NoReference(Exception):
    """There is no output to compare with; the message says why."""


def reference_of(case: Case) -> Case | None:
    """The same case with its dtype alone and no limit, or None where it has no other flag, or random weights of which a
    flag puts others in place."""
    dtype = plain(case.optimizations)
    other_weights = case.weights == "random" and any(o.replaces for o in chosen(case.optimizations))
    if dtype == case.optimizations or other_weights:
        return None
    return case.model_copy(update={"optimizations": dtype, "limit_bytes": None})


class References:
    """The outputs that others are compared with, in a temporary folder until the session ends.

    The xdist workers of one sweep share a `folder`: what one has made the others find, and what is not there yet each
    makes for itself.
    """

    def __init__(self, cases: Iterable[Case], folder: Path | None = None) -> None:
        self._own = None if folder else TemporaryDirectory(prefix="pytest-vram-")
        self._folder = folder or Path(self._own.name if self._own else "")
        self._wanted = {reference for case in cases if (reference := reference_of(case))}
        self._failed: dict[Path, str] = {}

    def _path(self, reference: Case, on_host: bool) -> Path:
        name = f"{reference.model_dump_json()} {on_host}"
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()}.npy"

    def keep(self, case: Case) -> Path | None:
        """Where this case leaves its output, if others are compared with it."""
        return self._path(case, False) if case in self._wanted else None

    def find(self, case: Case, make: Make) -> tuple[Case, Path] | None:
        """The case with its dtype alone and the file with its output, which `make` makes where it is missing.

        Raises:
            NoReference: when it could not be made.
        """
        reference = reference_of(case)
        if reference is None:
            return None
        # random weights of an offloaded case are made in host memory, and so are those of what it is compared with
        on_host = case.weights == "random" and any(o.offloads for o in chosen(case.optimizations))
        path = self._path(reference, on_host)
        if not path.exists() and path not in self._failed and (problem := make(reference, path, on_host)):
            self._failed[path] = problem
        if path in self._failed:
            raise NoReference(f"{reference.id} gave no output to compare with: {self._failed[path]}")
        return reference, path

    def close(self) -> None:
        if self._own:
            self._own.cleanup()


# In the worker


def pixels(output: Any) -> Any:
    """What a pipeline gave with `output_type="pt"`, as a float32 array with values from 0 to 1, or None."""
    import torch

    for name in ("images", "frames"):
        found = getattr(output, name, None)
        if isinstance(found, torch.Tensor):
            return found.detach().cpu().float().numpy()
    return None


def save_output(output: Any, path: Path) -> None:
    """Keep the output for others; whole or not at all."""
    import numpy

    partial = path.with_suffix(f".{os.getpid()}.partial")  # two processes may make the same one
    with partial.open("wb") as file:
        numpy.save(file, pixels(output), allow_pickle=False)
    partial.rename(path)


def difference(output: Any, path: Path) -> dict[str, float | None]:
    """Maximum and mean absolute difference of values from 0 to 1, and PSNR in dB (None where nothing differs).

    Raises:
        ValueError: when the two cannot be compared.
    """
    import numpy

    ours = pixels(output)
    try:
        theirs = numpy.load(path, allow_pickle=False)
    except EOFError as error:
        raise ValueError("the output to compare with is empty") from error
    if ours is None or not isinstance(theirs, numpy.ndarray) or ours.shape != theirs.shape:
        raise ValueError("the outputs have different shapes")
    if not (numpy.isfinite(ours).all() and numpy.isfinite(theirs).all()):
        raise ValueError("an output holds values that are not finite")
    apart = numpy.abs(ours - theirs, dtype=numpy.float64)
    mean_square = float((apart**2).mean())
    return {
        "max_abs_difference": float(apart.max()),
        "mean_abs_difference": float(apart.mean()),
        "psnr_db": -10 * math.log10(mean_square) if mean_square else None,
    }

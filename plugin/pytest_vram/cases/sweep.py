"""Sweeps: named blocks of axes in `matrix.toml`, expanded into cases."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from pytest_vram.cases.case import Case, Weights, parse_resolution
from pytest_vram.cases.models import Model, find_model
from pytest_vram.cases.thresholds import Thresholds
from pytest_vram.cases.toml import read_toml
from pytest_vram.errors import UsageError, unknown

NATIVE = "native"
MOST_IN_A_BATCH = 65536  # each has a prompt of its own in host memory
MOST_CASES = 100_000  # of one block, before its exclusions
T = TypeVar("T")
ParseOptimizations = Callable[[str], tuple[str, ...]]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Exclusion(_Table):
    """Cases that match every axis given here are left out of the block."""

    models: tuple[str, ...] | None = None
    optimizations: tuple[str, ...] | None = None
    resolutions: tuple[str | int, ...] | None = None
    frames: tuple[Literal["native"] | int, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None


class Block(_Table):
    """The product of five axes, less the exclusions; frames are an axis of videos alone."""

    models: tuple[str, ...] = Field(min_length=1)
    optimizations: tuple[str, ...] = Field(min_length=1)
    resolutions: tuple[str | int, ...] = Field(default=(NATIVE,), min_length=1)
    frames: tuple[Literal["native"] | int, ...] = Field(default=("native",), min_length=1)
    batch_sizes: tuple[int, ...] = Field(default=(1,), min_length=1)
    exclude: tuple[Exclusion, ...] = Field(default=(), max_length=1000)


class Sweep(_Table):
    """Named blocks, all run with the same number of denoising steps (the model's own where none is given)."""

    steps: int | None = Field(default=None, gt=0, le=100_000)
    blocks: dict[str, Block] = Field(min_length=1)


class Matrix(_Table):
    """The file `matrix.toml`."""

    sweeps: dict[str, Sweep] = Field(min_length=1)
    thresholds: Thresholds = Thresholds()


@dataclass(frozen=True)
class Overrides:
    """What the command line says in place of the matrix; None leaves the matrix as it is."""

    models: tuple[str, ...] | None = None
    optimizations: tuple[str, ...] | None = None
    resolutions: tuple[str, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None
    steps: int | None = None
    frames: tuple[str, ...] | None = None


def read_thresholds(path: Path) -> Thresholds:
    """The thresholds of a matrix file; raises UsageError, naming the file and the key."""
    return read_toml(path, Matrix).thresholds


def read_sweep(path: Path, name: str) -> Sweep:
    """The sweep called `name` of a matrix file.

    Raises:
        UsageError: naming the file and the key.
    """
    matrix = read_toml(path, Matrix)
    if name not in matrix.sweeps:
        raise UsageError(f"{path}: sweeps: {unknown('sweep', name, matrix.sweeps)}")
    return matrix.sweeps[name]


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Turns a ValueError on one value of an axis into a UsageError that says where the value stands."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error


def expand(
    sweep: Sweep,
    source: str,
    models: Mapping[str, Model],
    parse_optimizations: ParseOptimizations,
    overrides: Overrides,
    *,
    weights: Weights = "random",
    limit_bytes: int | None = None,
) -> list[Case]:
    """The cases of a sweep in the order of its blocks, duplicates merged.

    `source` names the sweep in messages (the file and the sweep's key).

    Raises:
        UsageError: an unknown name, a resolution the model cannot take, a batch size below 1.
    """
    cases: dict[Case, None] = {}
    for block_name, block in sweep.blocks.items():
        where = f"{source}.blocks.{block_name}"
        excluded = _exclusions(block, models, parse_optimizations, where)
        for point in _axes(block, where, models, parse_optimizations, overrides):
            if any(matches(point) for matches in excluded):
                continue
            model, (width, height) = point.model, point.size
            native = model.native
            case = Case(
                model=model.name,
                optimizations=point.optimizations,
                height=height,
                width=width,
                frames=point.frames,
                batch_size=point.batch_size,
                steps=overrides.steps or sweep.steps or native.steps,
                guidance_scale=native.guidance_scale,
                sequence_length=native.sequence_length,
                scheduler=model.scheduler.class_name,
                weights=weights,
                limit_bytes=limit_bytes,
            )
            cases[case] = None
    if not cases:
        raise UsageError(f"{source}: its exclusions leave no case")
    return list(cases)


@dataclass(frozen=True)
class _Point:
    """One combination of a block's axes; `size` is (width, height)."""

    model: Model
    optimizations: tuple[str, ...]
    size: tuple[int, int]
    frames: int | None
    batch_size: int


def _axes(
    block: Block,
    where: str,
    models: Mapping[str, Model],
    parse_optimizations: ParseOptimizations,
    overrides: Overrides,
) -> Iterator[_Point]:
    def axis(name: str, from_block: Sequence[T], from_option: Sequence[T] | None) -> tuple[Sequence[T], str]:
        if from_option is None:
            return from_block, f"{where}.{name}"
        return from_option, f"--vram-{name.replace('_', '-')}"

    names, names_at = axis("models", block.models, overrides.models)
    sets, sets_at = axis("optimizations", block.optimizations, overrides.optimizations)
    sizes, sizes_at = axis("resolutions", block.resolutions, overrides.resolutions)
    counts, counts_at = axis("frames", block.frames, overrides.frames)
    batches, batches_at = axis("batch_sizes", block.batch_sizes, overrides.batch_sizes)
    with _at(names_at):
        chosen = list(dict.fromkeys(find_model(name, models).name for name in names))
    with _at(sets_at):
        parsed = list(dict.fromkeys(parse_optimizations(text) for text in sets))
    with _at(batches_at):
        for batch in batches:
            if not 1 <= batch <= MOST_IN_A_BATCH:
                raise ValueError(f"a batch holds 1 to {MOST_IN_A_BATCH} images, not {str(batch)[:40]}")
    with _at(counts_at):
        if any(str(count) != NATIVE for count in counts) and all(models[name].kind == "image" for name in chosen):
            raise ValueError(f"{', '.join(chosen)}: makes images; leave frames out")
    product = len(chosen) * len(parsed) * len(sizes) * len(counts) * len(batches)
    if product > MOST_CASES:
        raise UsageError(
            f"{where}: the product of its axes is {product:,} cases, above {MOST_CASES:,}; make them shorter"
        )
    for name, optimizations, size, count, batch in itertools.product(chosen, parsed, sizes, counts, batches):
        model = models[name]
        with _at(sizes_at):
            resolution = _resolution(size, model)
            model.check_resolution(*resolution)
        with _at(counts_at):
            frames = _frames(count, model)
        yield _Point(model, optimizations, resolution, frames, batch)


def _resolution(value: str | int, model: Model) -> tuple[int, int]:
    return (model.native.width, model.native.height) if value == NATIVE else parse_resolution(value)


def _frames(value: str | int, model: Model) -> int | None:
    """Frames of a video; an image has none, whatever the axis says."""
    if model.native.frames is None:
        return None
    if value == NATIVE:
        return model.native.frames
    if not str(value).isdecimal() or not 0 < int(value) <= 100_000:
        raise ValueError(f"{value!r} is no number of frames; write 33 or native")
    model.check_frames(int(value))
    return int(value)


Matcher = Callable[[_Point], bool]


def _exclusions(
    block: Block, models: Mapping[str, Model], parse_optimizations: ParseOptimizations, where: str
) -> list[Matcher]:
    def matcher(exclusion: Exclusion, at: str) -> Matcher:
        with _at(f"{at}.models"):
            names = {find_model(name, models).name for name in exclusion.models or ()}
        with _at(f"{at}.optimizations"):
            sets = {parse_optimizations(text) for text in exclusion.optimizations or ()}
        with _at(f"{at}.resolutions"):
            for size in exclusion.resolutions or ():
                if size != NATIVE:
                    parse_resolution(size)

        def matches(point: _Point) -> bool:
            sizes = {_resolution(size, point.model) for size in exclusion.resolutions or ()}
            frames = {point.model.native.frames if count == NATIVE else count for count in exclusion.frames or ()}
            return (
                (exclusion.models is None or point.model.name in names)
                and (exclusion.optimizations is None or point.optimizations in sets)
                and (exclusion.resolutions is None or point.size in sizes)
                and (exclusion.frames is None or point.frames in frames)
                and (exclusion.batch_sizes is None or point.batch_size in exclusion.batch_sizes)
            )

        return matches

    return [matcher(exclusion, f"{where}.exclude.{n}") for n, exclusion in enumerate(block.exclude)]

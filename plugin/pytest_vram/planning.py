"""What a sweep will run: its options as one object, and the cases that they and the matrix ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_vram.against import BaseOptions
from pytest_vram.cases.case import Case, OwnCase, Weights
from pytest_vram.cases.models import Model, is_folder, model_from_folder, read_models
from pytest_vram.cases.shard import Shard
from pytest_vram.cases.sweep import Overrides, expand, read_sweep
from pytest_vram.measure.machine import Device
from pytest_vram.measure.measurement import Settings
from pytest_vram.pipelines.hub import is_hub_id, model_from_hub
from pytest_vram.pipelines.optimizations import parse_optimizations

PACKAGED_MATRIX = Path(__file__).parent / "cases" / "matrix.toml"


@dataclass(frozen=True)
class Options:
    """The command line, parsed once."""

    device: Device = "meta"
    matrix: Path | None = None
    sweep: str = "default"
    overrides: Overrides = field(default_factory=Overrides)
    weights: Weights = "random"
    limit_bytes: int | None = None
    settings: Settings = field(default_factory=Settings)
    results: Path = Path("results")
    shard: Shard | None = None
    resume: bool = False
    allow_shared: bool = False
    name_host: bool = False
    estimate: bool = True
    base: BaseOptions | None = None
    tests: tuple[str, ...] = ()
    selection: Mapping[str, Any] = field(default_factory=dict)  # pytest's own options that leave tests out


@dataclass(frozen=True)
class Plan:
    """One case and the model it names."""

    case: Case
    model: Model


def read_plans(matrix: Path, options: Options) -> list[Plan]:
    """The cases of a matrix, as the options say; raises UsageError."""
    models = read_models(matrix.parent / "models")
    overrides = options.overrides
    if overrides.models is not None:
        folders = [name for name in overrides.models if is_folder(name)]
        overrides = _with_folders(overrides, folders, models, options.weights)
    sweep = read_sweep(matrix, options.sweep)
    cases = expand(
        sweep,
        f"{matrix}: sweeps.{options.sweep}",
        models,
        parse_optimizations,
        overrides,
        weights=options.weights,
        limit_bytes=options.limit_bytes,
    )
    plans = [Plan(case, models[case.model]) for case in cases]
    if options.weights == "pretrained":
        for model in {plan.model.name: plan.model for plan in plans}.values():
            if is_folder(model.hub_id) and Path(model.hub_id).exists():
                model_from_folder(Path(model.hub_id))  # says what is missing before anything runs
    return plans


def _with_folders(
    overrides: Overrides, folders: Sequence[str], models: dict[str, Model], weights: Weights
) -> Overrides:
    """The saved pipelines among the models, folders and hub ids, made known under their own names."""
    names = {}
    for folder in folders:
        trained = weights == "pretrained"
        model = model_from_hub(folder) if is_hub_id(folder) else model_from_folder(Path(folder), with_weights=trained)
        from pytest_vram.pipelines.build import with_call_defaults  # imports diffusers, which few sweeps need here

        models[model.name] = with_call_defaults(model)
        names[folder] = model.name
    return replace(overrides, models=tuple(names.get(name, name) for name in overrides.models or ()))


def own_case(node_id: str, limit_bytes: int | None, number: int = 1, build: str = "-", call: str = "-") -> OwnCase:
    """The case that a test with a pipeline of its own measures, as the `number`-th."""
    model, test = split_node_id(node_id)
    test += f"#{number}" if number > 1 else ""
    return OwnCase(model=model, test=test, build=build, call=call, limit_bytes=limit_bytes)


def split_node_id(node_id: str) -> tuple[str, str]:
    """A test's file and its name there."""
    model, _, test = node_id.partition("::")
    return model, test

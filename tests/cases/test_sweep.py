"""Sweeps: reading a matrix, and expanding blocks into cases."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import pytest_vram.cases
from pytest_vram.cases.case import Case
from pytest_vram.cases.models import read_models
from pytest_vram.cases.sweep import Overrides, Sweep, expand, read_sweep
from pytest_vram.errors import UsageError
from pytest_vram.pipelines.optimizations import OPTIMIZATIONS, parse_optimizations

TESTS = Path(__file__).parents[1]
BENCH = TESTS.parent / "bench" / "matrix.toml"
PACKAGED = Path(pytest_vram.cases.__path__[0]) / "matrix.toml"
MODELS = read_models(TESTS / "models")


def cases_of(sweep: Sweep, overrides: Overrides | None = None, **options: Any) -> list[Case]:
    return expand(sweep, "m.toml: sweeps.s", MODELS, parse_optimizations, overrides or Overrides(), **options)


def sweep(*blocks: dict[str, Any], **facts: Any) -> Sweep:
    """A sweep of blocks called a, b, …; what a block does not say is tiny-sd in fp32."""
    plain = {"models": ["tiny-sd"], "optimizations": ["fp32"]}
    return Sweep.model_validate({"blocks": {chr(97 + n): {**plain, **b} for n, b in enumerate(blocks)}, **facts})


def ids(cases: Sequence[Case]) -> list[str]:
    return [case.id for case in cases]


def refusal(block: dict[str, Any], overrides: Overrides | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        cases_of(sweep(block), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_block_is_the_product_of_its_axes() -> None:
    assert ids(cases_of(read_sweep(TESTS / "matrix.toml", "default"))) == [
        "tiny-sd/fp32/32x32/b1",
        "tiny-sd/fp32/32x32/b2",
        "tiny-sd/fp32+vae_slicing/32x32/b1",
        "tiny-sd/fp32+vae_slicing/32x32/b2",
    ]


def test_a_case_has_what_the_model_was_made_for() -> None:
    (case,) = cases_of(sweep({}))
    assert (case.steps, case.guidance_scale, case.sequence_length) == (3, 5.0, 77)
    assert (case.scheduler, case.weights, case.limit_bytes) == ("PNDMScheduler", "random", None)
    (case,) = cases_of(sweep({}, steps=9), weights="pretrained", limit_bytes=1 << 33)
    assert (case.steps, case.weights, case.limit_bytes) == (9, "pretrained", 1 << 33)


def test_duplicates_are_merged_in_the_order_of_the_blocks() -> None:
    cases = cases_of(
        sweep(
            {"resolutions": ["native", 64, "32x32"], "optimizations": ["fp16+vae_tiling", "vae_tiling + fp16"]},
            {"resolutions": ["64x64", 16], "optimizations": ["fp16+vae_tiling"]},
        )
    )
    assert ids(cases) == [f"tiny-sd/fp16+vae_tiling/{size}/b1" for size in ("32x32", "64x64", "16x16")]


def test_an_alias_runs_once_under_the_name() -> None:
    cases = cases_of(sweep({"models": ["tiny", "tiny-sd"]}, {"models": ["tiny"]}))
    assert ids(cases) == ["tiny-sd/fp32/32x32/b1"]


@pytest.mark.parametrize(
    ("exclusion", "left"),
    [
        ({"batch_sizes": [2]}, {"fp32/32x32/b1", "fp32/64x64/b1", "fp16/32x32/b1", "fp16/64x64/b1"}),
        (
            {"models": ["tiny"], "resolutions": ["native"]},
            {f"{o}/64x64/b{b}" for o in ("fp32", "fp16") for b in (1, 2)},
        ),
        (
            {"optimizations": ["fp16"], "resolutions": ["native", "64"]},
            {f"fp32/{s}x{s}/b{b}" for s in (32, 64) for b in (1, 2)},
        ),
        ({"models": ["sdxl"]}, {f"{o}/{s}x{s}/b{b}" for o in ("fp32", "fp16") for s in (32, 64) for b in (1, 2)}),
    ],
)
def test_an_exclusion_needs_every_axis_to_match(exclusion: dict[str, Any], left: set[str]) -> None:
    block = {"optimizations": ["fp32", "fp16"], "resolutions": [32, 64], "batch_sizes": [1, 2]}
    cases = cases_of(sweep({**block, "exclude": [exclusion]}))
    assert set(ids(cases)) == {f"tiny-sd/{rest}" for rest in left}


def test_an_exclusion_is_its_blocks_own() -> None:
    excluding = {"batch_sizes": [1, 2], "exclude": [{"batch_sizes": [2]}]}
    assert ids(cases_of(sweep(excluding, {"batch_sizes": [2]}))) == ["tiny-sd/fp32/32x32/b1", "tiny-sd/fp32/32x32/b2"]


def test_all_excluded() -> None:
    assert refusal({"exclude": [{"models": ["tiny-sd"]}]}) == "m.toml: sweeps.s: its exclusions leave no case"


def test_overrides_replace_their_axis_in_each_block() -> None:
    blocks = sweep({"batch_sizes": [1, 2]}, {"optimizations": ["fp16"], "resolutions": [64]}, steps=9)
    everything = Overrides(("sdxl-turbo",), ("vae_slicing+bf16",), ("64x32", "native"), (3,), 5)
    cases = cases_of(blocks, everything)
    assert ids(cases) == [f"sdxl-turbo/bf16+vae_slicing/{size}/b3" for size in ("64x32", "512x512")]
    assert {case.steps for case in cases} == {5}
    assert ids(cases_of(blocks, Overrides(batch_sizes=(4,)))) == ["tiny-sd/fp32/32x32/b4", "tiny-sd/fp16/64x64/b4"]


@pytest.mark.parametrize(
    ("axis", "value", "problem"),
    [
        ("models", "tinny-sd", "unknown model 'tinny-sd'; did you mean 'tiny-sd'?"),
        ("optimizations", "fp32+vae_tilling", "unknown optimization 'vae_tilling'; did you mean 'vae_tiling'?"),
        ("optimizations", "fp16+bf16", "'fp16+bf16' needs exactly one of fp32, fp16, bf16, and has fp16 and bf16"),
        ("optimizations", "vae_tiling", "'vae_tiling' needs exactly one of fp32, fp16, bf16, and has none"),
        ("resolutions", "big", "'big' is not a resolution"),
        ("resolutions", "33", "tiny-sd takes multiples of 2 pixels, not 33x33; try 32x32"),
        ("batch_sizes", 0, "a batch holds 1 to 65536 images, not 0"),
    ],
)
def test_a_message_says_where_the_value_stands(axis: str, value: Any, problem: str) -> None:
    assert refusal({axis: [value]}).startswith(f"m.toml: sweeps.s.blocks.a.{axis}: {problem}")
    option = f"--vram-{axis.replace('_', '-')}"
    override: dict[str, Any] = {axis: (value,)}
    assert refusal({}, Overrides(**override)).startswith(f"{option}: {problem}")
    if axis != "batch_sizes" and "multiples" not in problem:  # a size that nothing has excludes nothing
        message = refusal({"exclude": [{}, {axis: [value]}]})
        assert message.startswith(f"m.toml: sweeps.s.blocks.a.exclude.1.{axis}: {problem}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[sweeps.s.blocks.a]\nmodels = ['m']", ": sweeps.s.blocks.a.optimizations: field required"),
        ("[sweeps.s.blocks.a]\nmodels = []\noptimizations = ['fp16']", ": sweeps.s.blocks.a.models: "),
        ("[sweeps.s.blocks.a]\nmodels = 'm'\noptimizations = ['fp16']", ": sweeps.s.blocks.a.models: "),
        (
            "[sweeps.s.blocks.a]\nmodels = ['m']\noptimizations = ['fp16']\nbatches = [1]",
            ": sweeps.s.blocks.a.batches: is not a key of this table",
        ),
        (
            "[sweeps.s.blocks.a]\nmodels = ['m']\noptimizations = ['fp16']\nexclude = [{ model = ['m'] }]",
            ": sweeps.s.blocks.a.exclude.0.model: is not a key of this table",
        ),
        ("[sweeps.s]\nsteps = 0\nblocks.a = { models = ['m'], optimizations = ['fp16'] }", ": sweeps.s.steps: "),
        ("[sweeps.s]\nsteps = 2", ": sweeps.s.blocks: field required"),
        ("[sweeps.s.blocks]", ": sweeps.s.blocks: "),
        ("[sweeps]", ": sweeps: "),
        ("", ": sweeps: field required"),
        ("sweeps = ", ": "),
        ("# \udcff", ": is not UTF-8 text"),
    ],
)
def test_malformed_matrix(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "matrix.toml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UsageError) as caught:
        read_sweep(path, "s")
    assert str(caught.value).startswith(f"{path}{expected}")
    assert "\n" not in str(caught.value)


def test_no_matrix(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: .*No such file"):
        read_sweep(tmp_path / "none.toml", "default")


def test_unknown_sweep() -> None:
    with pytest.raises(UsageError, match=r"matrix\.toml: sweeps: unknown sweep 'smok'; did you mean 'smoke'\?"):
        read_sweep(BENCH, "smok")


@pytest.mark.parametrize("path", [BENCH, PACKAGED], ids=["bench", "packaged"])
def test_default_sweep(path: Path) -> None:
    cases = cases_of(read_sweep(path, "default"))
    assert len(cases) <= 32
    assert {case.steps for case in cases} == {8}
    for name in ("stable-diffusion-v1-5", "sdxl", "sdxl-turbo"):
        native = MODELS[name].native.width
        assert {native, 1024} <= {case.width for case in cases if case.model == name}


def test_the_sweeps_of_this_repository_leave_nothing_out() -> None:
    cases = [case for sweep in ("default", "frontier", "two_gpus") for case in cases_of(read_sweep(BENCH, sweep))]
    assert {name for case in cases for name in case.optimizations} == set(OPTIMIZATIONS)
    cases = cases_of(read_sweep(BENCH, "default"))
    assert {case.batch_size for case in cases} == {1, 4}
    assert "sd-food" in read_sweep(BENCH, "default").blocks["sizes"].models


@pytest.mark.parametrize("path", [BENCH, PACKAGED], ids=["bench", "packaged"])
def test_smoke_sweep_is_small(path: Path) -> None:
    assert len(cases_of(read_sweep(path, "smoke"))) <= 4

"""The optimizations by name: parsing, what excludes what, and what the registry promises."""

import re

import pytest

from pytest_vram.pipelines.optimizations import DTYPES, OPTIMIZATIONS, chosen, excluded, impossible, parse_optimizations


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fp16", ("fp16",)),
        ("vae_tiling+fp16", ("fp16", "vae_tiling")),
        ("vae_tiling+vae_slicing+bf16+attention_slicing", ("bf16", "attention_slicing", "vae_slicing", "vae_tiling")),
        (" fp32 + fp32 + vae_tiling ", ("fp32", "vae_tiling")),
    ],
)
def test_parse(text: str, expected: tuple[str, ...]) -> None:
    assert parse_optimizations(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fp16+tiling", "unknown optimization 'tiling'; did you mean 'vae_tiling'"),
        ("fp16+", "unknown optimization ''"),
        ("", "unknown optimization ''"),
        ("FP16", "unknown optimization 'FP16'"),
        ("vae_tiling", "'vae_tiling' needs exactly one of fp32, fp16, bf16, and has none"),
        ("bf16+fp16", "needs exactly one of fp32, fp16, bf16, and has fp16 and bf16"),
    ],
)
def test_no_set_of_optimizations(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        parse_optimizations(text)


@pytest.mark.parametrize("names", [("model_offload", "sequential_offload"), ("sequential_offload", "model_offload")])
def test_two_offloads_are_impossible(names: tuple[str, str]) -> None:
    assert impossible(("fp16", *names), "cuda") == f"{names[0]} excludes {names[1]}"


@pytest.mark.parametrize("name", ["model_offload", "sequential_offload", "expandable_segments"])
def test_what_only_a_gpu_can_do(name: str) -> None:
    assert impossible(("fp16", name), "cpu") == f"{name} needs a GPU"
    assert impossible(("fp16", name), "cuda") is None
    assert impossible(("fp16", name), "meta") is None, "an estimate stands for a GPU"


def test_the_rest_runs_anywhere() -> None:
    names = ("fp32", "attention_slicing", "vae_slicing", "vae_tiling", "channels_last")
    assert impossible(names, "cpu") is None


def test_a_dtype_comes_first() -> None:
    assert tuple(OPTIMIZATIONS)[: len(DTYPES)] == DTYPES == ("fp32", "fp16", "bf16")


@pytest.mark.parametrize("name", OPTIMIZATIONS)
def test_registry(name: str) -> None:
    optimization = OPTIMIZATIONS[name]
    assert optimization.name == name
    assert optimization.summary
    assert "\n" not in optimization.summary
    assert "+" not in name, "a set is written with +"
    for other in excluded(name):
        assert name in excluded(other), "exclusion goes both ways"
        why = impossible(("bf16", *(n for n in OPTIMIZATIONS if n in (name, other))), "cuda")
        assert why is not None
        assert "excludes" in why


def test_what_decides_by_values_needs_trained_weights_and_a_gpu() -> None:
    names = ("bf16", "cache_first_block")
    why = "cache_first_block decides by the values it sees: "
    assert impossible(names, "cuda", "random") == why + "--vram-weights pretrained"
    assert impossible(names, "meta", "pretrained") == why + "there is no estimate"
    assert impossible(names, "cuda", "pretrained") is None


def test_of_one_kind_there_is_one() -> None:
    assert "attention_flash" in excluded("attention_slicing")
    assert "excludes attention_sage" in (impossible(("fp16", "attention_flash", "attention_sage"), "cuda") or "")
    assert impossible(("fp16", "attention_flash", "vae_slicing"), "cuda") is None


def test_chosen_keeps_the_order_of_the_names() -> None:
    assert [o.name for o in chosen(("fp16", "vae_tiling"))] == ["fp16", "vae_tiling"]

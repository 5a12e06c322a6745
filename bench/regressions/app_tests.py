"""One test a regression, and two that nothing happens to."""

from typing import Any

from app import build, build_held, build_upcast, build_vae, decode, four, maybe_leaking, maybe_too_large, one


def test_denoise(vram: Any) -> None:
    vram.measure(build_held, four)


def test_decode(vram: Any) -> None:
    vram.measure(build_upcast, one)


def test_oom(vram: Any) -> None:
    vram.measure(build, maybe_too_large)


def test_removed(vram: Any) -> None:
    vram.measure(build, one)


def test_host(vram: Any) -> None:
    vram.measure(build, maybe_leaking)


def test_time(vram: Any) -> None:
    vram.measure(build_vae, decode)


def test_plain(vram: Any) -> None:
    vram.measure(build, one)


def test_plain_four(vram: Any) -> None:
    vram.measure(build, four)

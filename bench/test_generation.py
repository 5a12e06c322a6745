"""The sweep of this repository: one test a case, from prompt to pixels, each in a process of its own."""

from typing import Any


def test_generation(vram_case: Any) -> None:
    vram_case.run()

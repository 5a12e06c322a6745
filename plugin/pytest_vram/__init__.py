"""Measure what a diffusion model costs on a GPU: which card it needs, and whether a commit made it worse."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_vram.report.frame import COLUMNS, load

__version__ = "0.1.0"
__all__ = ["COLUMNS", "load"]


def __getattr__(name: str) -> Any:
    """What notebooks use is imported when it is used: every pytest session imports this package."""
    if name in __all__:
        from pytest_vram.report import frame

        return getattr(frame, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Somebody's own pipeline: two functions of a test, as they travel to a worker."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

from pytest_vram.errors import UsageError


def described(function: Callable[..., Any], role: str) -> dict[str, str]:
    """File, module and qualified name, by which a worker finds the function again.

    Raises:
        UsageError: for whatever is not found by them.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if file is not None and _found(module, name) is function:
        return {"file": str(Path(file).absolute()), "module": function.__module__, "name": name}
    if not isinstance(function, FunctionType):
        raise UsageError(f"vram.measure: {role} is {name}, not a function; give one that is defined in a module")
    if "<lambda>" in name:
        why = "is a lambda"
    elif function.__closure__:
        why = f"is a closure: it holds {', '.join(function.__code__.co_freevars)} of the function around it"
    elif "<locals>" in name:
        why = "is defined inside another function"
    else:
        why = f"is not what {function.__module__} calls {name}"
    raise UsageError(f"vram.measure: {role} {name} {why}; a worker process takes only functions that it can import")


def _found(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def readable(function: dict[str, str], root: Path) -> str:
    """`file:function`, the file as seen from `root`."""
    file = Path(function["file"])
    inside = file.is_relative_to(root)
    return f"{(file.relative_to(root) if inside else Path(file.name)).as_posix()}:{function['name']}"

"""TOML files that people write, read into a validated table."""

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pytest_vram.errors import UsageError, first_problem

T = TypeVar("T", bound=BaseModel)


def read_toml(path: Path, table: type[T]) -> T:
    """The file as a `table`.

    Raises:
        UsageError: naming the file, and the key where one is wrong.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: is no file")
        return table.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UsageError(first_problem(error, path)) from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no TOML, a number of 5000 digits
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error

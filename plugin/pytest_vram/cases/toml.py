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
        return table.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    except ValidationError as error:
        raise UsageError(first_problem(error, path)) from error

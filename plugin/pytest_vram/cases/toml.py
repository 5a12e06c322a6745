"""TOML files that people write, read into a validated table."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pytest_vram.errors import UsageError, first_problem
from pytest_vram.untrusted import MAX_TOML_BYTES, parse_toml, read_text

T = TypeVar("T", bound=BaseModel)


def read_toml(path: Path, table: type[T]) -> T:
    """The file as a `table`.

    Raises:
        UsageError: naming the file, and the key where one is wrong.
    """
    document = parse_toml(read_text(path, UsageError, MAX_TOML_BYTES), path, UsageError)
    try:
        return table.model_validate(document)
    except ValidationError as error:
        raise UsageError(first_problem(error, path)) from error

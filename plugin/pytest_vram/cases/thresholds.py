"""How much worse is worse: limits by metric, from pyproject.toml and the matrix; a sweep's owner may set each."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pytest_vram.cases.case import parse_bytes
from pytest_vram.errors import UsageError, first_problem
from pytest_vram.untrusted import MAX_TOML_BYTES, parse_toml, read_text

Share = Annotated[float, Field(strict=True, gt=0, le=100, allow_inf_nan=False)]


def _size(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError('is no size; write it like "32MiB"')
    try:
        return parse_bytes(value, "")
    except UsageError as error:
        raise ValueError(str(error).removeprefix(": ")) from error


Size = Annotated[int, BeforeValidator(_size), Field(lt=1 << 50)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MemoryLimit(_Table):
    """Worse is above both: `relative`, a share of the base's figure, and `absolute`, in bytes."""

    relative: Share | None = None
    absolute: Size | None = None


class TimeLimit(_Table):
    """Worse is above both: `relative`, a share of the base's seconds, and `absolute_s`. `stored_relative` stands in for
    `relative` where the base could not be measured again."""

    relative: Share | None = None
    absolute_s: Annotated[float, Field(strict=True, gt=0, lt=1e7)] | None = None
    stored_relative: Share | None = None


class _Limits(_Table):
    allocated: MemoryLimit = MemoryLimit()
    need: MemoryLimit = MemoryLimit()
    host: MemoryLimit = MemoryLimit()
    time: TimeLimit = TimeLimit()


class Only(_Limits):
    """Limits for some cases only: those of these models whose id matches one of these patterns (`*` and `?`)."""

    models: tuple[str, ...] | None = Field(default=None, min_length=1)
    ids: tuple[str, ...] | None = Field(default=None, min_length=1)

    def concerns(self, model: str, id: str) -> bool:
        """Whether a case is one of them."""
        by_model = self.models is None or model in self.models
        return by_model and (
            self.ids is None or any(fnmatchcase(id, pattern.replace("[", "[[]")) for pattern in self.ids)
        )


class Thresholds(_Limits):
    """The table `thresholds`; what it does not say is left to the tables before it, and at last to the defaults."""

    only: tuple[Only, ...] = ()


DEFAULTS = Thresholds(
    allocated=MemoryLimit(relative=0.02, absolute="32MiB"),
    need=MemoryLimit(relative=0.02),
    host=MemoryLimit(relative=0.05, absolute="256MiB"),
    time=TimeLimit(relative=0.05, absolute_s=0.010, stored_relative=0.15),
)


class Limits:
    """The limits of each case, from tables of which the later go before the earlier; `own` are tables of single cases,
    by id: those of the matrix that planned them."""

    def __init__(self, tables: Iterable[Thresholds] = (), own: Mapping[str, Thresholds] | None = None) -> None:
        self._tables = (DEFAULTS, *tables)
        self._own = own or {}

    def of(self, metric: str, model: str, id: str) -> dict[str, Any]:
        """The keys of the limit for `allocated`, `need`, `host` or `time` of one case."""
        found: dict[str, Any] = {}
        for table in (*self._tables, *([self._own[id]] if id in self._own else [])):
            parts: Sequence[_Limits] = (table, *(only for only in table.only if only.concerns(model, id)))
            for part in parts:
                limit: BaseModel = getattr(part, metric)
                found |= {key: value for key in limit.model_fields_set if (value := getattr(limit, key)) is not None}
        return found


class _Tool(BaseModel):
    """What of pyproject.toml is ours."""

    thresholds: Thresholds = Thresholds()

    model_config = ConfigDict(extra="forbid")


def read_project(folder: Path) -> Thresholds:
    """The table `tool.pytest-vram.thresholds` of a folder's pyproject.toml, if it has one.

    Raises:
        UsageError: naming the file and the key.
    """
    path = folder / "pyproject.toml"
    if not path.is_file():
        return Thresholds()
    tool = parse_toml(read_text(path, UsageError, MAX_TOML_BYTES), path, UsageError).get("tool")
    ours = tool.get("pytest-vram", {}) if isinstance(tool, dict) else {}
    try:
        return _Tool.model_validate(ours).thresholds
    except ValidationError as error:
        raise UsageError(first_problem(error, path, "tool.pytest-vram")) from error

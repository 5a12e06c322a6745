"""One case: a model × optimizations × resolution × batch size, or a test of one's own; and how people write sizes."""

import contextlib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from pytest_vram.errors import UsageError

Weights = Literal["random", "pretrained"]
Number = Annotated[int, Field(gt=0, lt=1 << 31)]
Name = Annotated[str, Field(max_length=200)]
_BYTE_SIZE = TypeAdapter(ByteSize)


class Case(BaseModel):
    """What identifies one measurement. Resolutions are written width × height, as cards and screens are."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=200)
    optimizations: tuple[Name, ...] = Field(min_length=1, max_length=100)
    height: Number
    width: Number
    frames: Number | None = None
    batch_size: Number
    steps: Number
    guidance_scale: float = Field(ge=0)
    sequence_length: Number | None = None
    scheduler: Name
    seed: int = Field(default=0, ge=-(1 << 63), lt=1 << 63)
    weights: Weights = "random"
    limit_bytes: int | None = Field(default=None, gt=0, lt=1 << 50)

    @property
    def id(self) -> str:
        """A label for people and for `-k`; nothing parses it."""
        return "/".join((self.model, *self.labels))

    @property
    def labels(self) -> tuple[str, ...]:
        """What the id says beside the model."""
        parts = ["+".join(self.optimizations), f"{self.width}x{self.height}"]
        if self.frames:
            parts.append(f"f{self.frames}")
        parts.append(f"b{self.batch_size}")
        return (*parts, *_limit_label(self.limit_bytes))


class OwnCase(BaseModel):
    """A test that measures a pipeline of its own, by the functions that build and call it.

    `model` is the test's file, `test` its name there; `build` and `call` read `file:function`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str = Field(min_length=1, max_length=500)
    test: str = Field(min_length=1, max_length=500)
    build: str = Field(min_length=1, max_length=1000)
    call: str = Field(min_length=1, max_length=1000)
    limit_bytes: int | None = Field(default=None, gt=0, lt=1 << 50)

    @property
    def id(self) -> str:
        """The test's node id."""
        return f"{self.model}::{'/'.join(self.labels)}"

    @property
    def labels(self) -> tuple[str, ...]:
        """What the id says beside the file."""
        return (self.test, *_limit_label(self.limit_bytes))

    @property
    def optimizations(self) -> tuple[str, ...]:
        """None that we know of: they are in `build`."""
        return ()


def _kind(value: Any) -> str:
    own = "build" in value if isinstance(value, dict) else isinstance(value, OwnCase)
    return "kind:own" if own else "kind:sweep"


AnyCase = Annotated[Annotated[Case, Tag("kind:sweep")] | Annotated[OwnCase, Tag("kind:own")], Discriminator(_kind)]


def _limit_label(limit_bytes: int | None) -> tuple[str, ...]:
    if not limit_bytes:
        return ()
    if limit_bytes % 10**9 == 0:
        return (f"{limit_bytes // 10**9}GB",)
    gib = limit_bytes / 2**30
    whole = abs(round(gib, 2) - gib) * 2**10 < 0.01  # what was written as 22.49GiB is no whole number of bytes
    return (f"{round(gib, 2):g}GiB" if whole else f"{limit_bytes / 2**20:g}MiB",)


def parse_bytes(text: str, option: str) -> int:
    """Bytes from `8GiB`, `500MiB` or `8GB`.

    Raises:
        UsageError: naming `option`, when the text is no positive size.
    """
    size = 0
    if re.fullmatch(r"\s*[\d.]{1,20}\s*[KMGT]?i?B\s*", text, re.IGNORECASE):  # bytes: not bits, nor a bare number
        with contextlib.suppress(ValidationError):
            size = int(_BYTE_SIZE.validate_python(text))
    if size <= 0:
        raise UsageError(f"{option}: {text!r} is not a size; write it like 8GiB or 500MiB")
    return size


def parse_resolution(value: str | int) -> tuple[int, int]:
    """(width, height) in pixels from 1024 or `1024x768`.

    Raises:
        ValueError: when the value is neither.
    """
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", str(value).strip())
    if not match:
        raise ValueError(f"{value!r} is not a resolution; write 1024, 1024x768 (width x height) or native")
    width, height = int(match[1]), int(match[2] or match[1])
    if not (0 < width <= 65536 and 0 < height <= 65536):
        raise ValueError(f"{value!r} is not a resolution; width and height are 1 to 65536 pixels")
    return width, height

"""One case: a model × optimizations × resolution × batch size, and the sizes that people write."""

import contextlib
import re
from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from pytest_vram.errors import UsageError

Weights = Literal["random", "pretrained"]
_BYTE_SIZE = TypeAdapter(ByteSize)


class Case(BaseModel):
    """What identifies one measurement. Resolutions are written width × height, as cards and screens are."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=200)
    optimizations: tuple[str, ...] = Field(min_length=1)
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    frames: int | None = Field(default=None, gt=0)
    batch_size: int = Field(gt=0)
    steps: int = Field(gt=0)
    guidance_scale: float = Field(ge=0)
    sequence_length: int | None = Field(default=None, gt=0)
    scheduler: str
    seed: int = 0
    weights: Weights = "random"
    limit_bytes: int | None = Field(default=None, gt=0)

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
        if self.limit_bytes:
            gib = self.limit_bytes / 2**30
            parts.append(f"{gib:g}GiB" if round(gib, 2) == gib else f"{self.limit_bytes / 2**20:g}MiB")
        return tuple(parts)


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

"""One of N parts of a sweep: `--vram-shard 2/8`, for a CI matrix or a job array."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_vram.errors import UsageError

OPTION = "--vram-shard"


@dataclass(frozen=True)
class Shard:
    """Shard `number` of `of`, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard written as `2/8`; raises UsageError."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if found is None:
            raise UsageError(f"{OPTION}: {text!r} is no shard; write 2/8, the second of eight")
        number, of = map(int, found.groups())
        if not 1 <= number <= of:
            right = f"write 1/{of} to {of}/{of}" if of else "write 1/1, or more shards"
            raise UsageError(f"{OPTION}: there is no shard {number} of {of}; {right}")
        return cls(number, of)

    def take(self, ids: Sequence[str]) -> list[str]:
        """Every `of`-th of these cases, from the `number`-th on.

        Raises:
            UsageError: where some shard would have no case.
        """
        if len(ids) < self.of:
            only = "1 case" if len(ids) == 1 else f"{len(ids)} cases"
            raise UsageError(f"{OPTION}: {self}: there are only {only}; write /{len(ids)}, or fewer shards")
        return list(ids[self.number - 1 :: self.of])

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

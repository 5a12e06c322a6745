"""Cards: the GPUs that people own or rent, with the memory they leave to a program."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pytest_vram.cases.toml import read_toml
from pytest_vram.errors import UsageError

GIB = 1 << 30
PACKAGED = Path(__file__).parent / "cards.toml"
WITH_A_SCREEN = ("desktop", "laptop", "workstation")
DESKTOP_GIB = 1.0  # what a desktop holds: see the head of cards.toml
NATIVE_FROM = {"bf16": (8, 0), "fp8": (8, 9)}  # the first compute capability whose hardware has the dtype

Positive = Field(default=None, gt=0, le=1e9)
Name = Annotated[str, Field(max_length=100)]
MOST_CARDS = 10_000


class Card(BaseModel):
    """One GPU on the market; `cards.toml` explains the keys, and says of each figure where it is from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Name = Field(min_length=1)
    aliases: tuple[Name, ...] = Field(default=(), max_length=100)
    reported_as: Name | None = None
    vendor: Literal["nvidia", "amd", "intel"] = "nvidia"
    kind: Literal["desktop", "laptop", "workstation", "datacenter", "unified"]
    memory_gib: float = Field(gt=0, le=4096)
    visible_gib: float = Field(gt=0, le=4096)
    bandwidth_gb_s: float | None = Positive
    fp16_tflops: float | None = Positive
    bf16_tflops: float | None = Positive
    fp8_tflops: float | None = Positive
    compute_capability: str | None = Field(default=None, pattern=r"^\d{1,2}\.\d$")
    desktop_reserve_gib: float = Field(default=0.0, ge=0, le=16)  # of a kind with a screen 1.0, where it is not given
    headline: bool = False

    @cached_property
    def usable_bytes(self) -> int:
        """What a program may take: what PyTorch sees, less what the desktop holds."""
        return int((self.visible_gib - self.desktop_reserve_gib) * GIB)

    @property
    def memory_only(self) -> bool:
        """Whether memory alone is judged: needs are measured with CUDA, which this card does not run."""
        return self.vendor != "nvidia"

    @cached_property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability as numbers."""
        if self.compute_capability is None:
            return None
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    def lacks(self, optimizations: Iterable[str]) -> str | None:
        """The dtype among these optimizations that the card's hardware does not have, or None."""
        if self.capability is None:
            return None
        return next((n for n in optimizations if n in NATIVE_FROM and self.capability < NATIVE_FROM[n]), None)

    def is_gpu(self, name: object, memory_bytes: object) -> bool:
        """Whether a GPU of this name and memory, as PyTorch tells them, is this card: variants share a name, and the
        memory of one varies with the driver and with ECC."""
        if self.reported_as is None or name != self.reported_as:
            return False
        if not isinstance(memory_bytes, int) or not 0 < memory_bytes < 1 << 50:
            return False
        return abs(memory_bytes / GIB / self.visible_gib - 1) < 0.1


class _Cards(BaseModel):
    model_config = ConfigDict(extra="forbid")

    cards: tuple[Card, ...] = Field(min_length=1, max_length=MOST_CARDS)


def read_cards(*files: Path, headless: bool = False) -> list[Card]:
    """The packaged cards and those of `files`, smallest memory first; a later card replaces one of the same name.

    On a `headless` machine no desktop holds anything of any card.

    Raises:
        UsageError: naming the file and the key.
    """
    cards: dict[str, Card] = {}
    for path in (PACKAGED, *files):
        for number, card in enumerate(read_toml(path, _Cards).cards):
            where = f"{path}: cards.{number}"
            if "desktop_reserve_gib" not in card.model_fields_set and card.kind in WITH_A_SCREEN:
                card = card.model_copy(update={"desktop_reserve_gib": DESKTOP_GIB})
            if card.visible_gib <= card.desktop_reserve_gib:
                raise UsageError(f"{where}.desktop_reserve_gib: leaves nothing of the {card.visible_gib:g} GiB visible")
            if card.visible_gib > card.memory_gib:
                raise UsageError(f"{where}.visible_gib: is above memory_gib, {card.memory_gib:g}")
            if path != PACKAGED:
                card = card.model_copy(update={"headline": True})  # a team's own cards are what it asks about
            if headless:
                card = card.model_copy(update={"desktop_reserve_gib": 0.0})
            cards[_key(card.name)] = card
    return sorted(cards.values(), key=lambda card: (card.usable_bytes, card.name))


def find_card(text: str, cards: Sequence[Card]) -> Card:
    """The card that a person means by `RTX 3060`.

    Raises:
        UsageError: with the nearest names, or with the cards that all match.
    """
    wanted = _key(text[:200])
    named = [card for card in cards if wanted == _key(card.name)]
    named = named or [card for card in cards if wanted in map(_key, card.aliases)]
    if len(named) == 1:
        return named[0]
    part = [card for card in cards if wanted and wanted in _key(card.name)]
    if len(part) == 1:
        return part[0]
    part = named or part
    if part:
        several = ", ".join(card.name for card in part[:6]) + (", ..." if len(part) > 6 else "")
        raise UsageError(f"--card: {text!r} may be any of {several}; write one of them in full")
    by_key = {_key(name): card.name for card in cards for name in (card.name, *card.aliases)}
    near = [by_key[key] for key in get_close_matches(wanted, by_key, n=2, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    raise UsageError(f"--card: no card is called {text!r}{hint} (`pytest-vram cards` lists them)")


def _key(name: str) -> str:
    """A name without what people leave out or write in several ways."""
    return re.sub(r"nvidia|geforce|\W|_", "", name.lower())

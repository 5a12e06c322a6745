"""How figures and names are written: in terminals, Markdown and CSV-like cells. Names come from files of strangers."""

import re
from collections.abc import Iterable, Mapping

from pytest_vram.errors import printable

_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")
_LINK = re.compile(r"(https?|ftp|www)([:.])", re.IGNORECASE)  # what GitHub makes a link of by itself
_PLAIN = re.compile(r"[\w.+/:, ×-]+", re.ASCII)


def gib(value: int | None) -> str:
    """Bytes as GiB with two digits; an en dash for what is not known."""
    return "–" if value is None else f"{value / 2**30:.2f}"


def seconds(value: float | None) -> str:
    """Seconds with three digits that matter."""
    return "–" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def duration(value: float) -> str:
    """Minutes and seconds, or hours, minutes and seconds."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign; a true minus."""
    text = f"{value:+.{digits}f}"
    return ("0" if float(text) == 0 else text).replace("-", "−")


def display_name(model: str, aliases: Mapping[str, Iterable[str]]) -> str:
    """A model's name with its aliases behind it."""
    others = ", ".join(aliases.get(model, ()))
    return f"{model} ({others})" if others else model


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, also in a table's cell."""
    line = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _LINK.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\1", line))


def code(text: str) -> str:
    """A name in a code span; a name that could end the span is shown as plain text."""
    line = printable(text)
    return f"`{line}`" if line and _PLAIN.fullmatch(line) else markdown(text)

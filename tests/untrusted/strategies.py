"""What strangers may write: any bytes, any JSON, and documents that are right but for a few changes."""

import copy
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st

from pytest_vram.errors import MAX_MESSAGE, VramError

T = TypeVar("T")

PLANTED = (
    "<script>alert(1)</script>",
    "\x1b[31mred\x1b[0m\x07",
    "\u202egpj.exe\u2066 \u200b\ufeff",
    "a | b || c\nd\r\n| e |",
    "`code` ``` **b** [x](javascript:1) ![i](http://x)",
    "=cmd|' /C calc'!A0",
    "](x) <!-- --> {{ 7*7 }} {% raw %} ${7}",
    "[red]markup[/red] [link=http://x]y[/link] \\[",
    "../../../etc/passwd",
    "C:\\..\\..\\x\0y",
    "\ud800",
    "é" * 300,
    "\x85\x9b31m\u2028\u2029\x7f",
    "__proto__",
)

texts = st.one_of(st.text(max_size=30), st.sampled_from(PLANTED), st.sampled_from(PLANTED).map(lambda t: t * 50))
numbers = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 10**9, 2**31, 2**63, 2**64, 10**15, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([1e308, 5e-324, -0.0]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


odd = st.one_of(values, st.sampled_from([3, 30, 300]).map(nested), st.sampled_from([3, 300]).map(lambda n: [n] * n))


@st.composite
def mutated(draw: st.DrawFn, documents: Sequence[Any]) -> Any:
    """One of these documents with one to four changes: another value, a key less, more or renamed, an item twice."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 4))):
        holder: Any = document
        while True:
            keys: list[Any] = sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and draw(st.integers(0, 5)):
                holder = inner
                continue
            match draw(st.integers(0, 7)):
                case 0:
                    del holder[key]
                case 1 if isinstance(holder, dict):
                    holder[draw(texts)] = holder.pop(key)
                case 1:
                    holder.append(copy.deepcopy(inner))
                case 2 if isinstance(inner, str):
                    holder[key] = inner + draw(texts)
                case 3 if isinstance(inner, int | float):
                    holder[key] = draw(numbers)
                case 4 if isinstance(inner, str):
                    holder[key] = draw(texts)
                case _:
                    holder[key] = draw(odd)
            break
    return document


def as_json(document: Any) -> bytes:
    """JSON as Python writes it, NaN and half surrogates included."""
    return json.dumps(document).encode()


def as_toml(document: dict[Any, Any]) -> bytes:
    """TOML with one key a line; what TOML cannot hold is left out."""
    lines = (f"{_toml_text(str(key))} = {_toml(value)}" for key, value in document.items() if value is not None)
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_text(str(k))} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(one) for one in value if one is not None) + "]"
    if isinstance(value, str):
        return _toml_text(value)
    if isinstance(value, float):
        return "nan" if value != value else str(value)
    return str(value).lower() if isinstance(value, bool) or abs(value) < 10**4000 else "1"


def _toml_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def value_or_refusal(read: Callable[[], T], *expected: type[VramError]) -> T | None:
    """What `read` gives, or None where it refuses in one bounded line that is all text. Anything else is a bug."""
    try:
        return read()
    except expected as error:
        assert_one_line(str(error))
        return None


def assert_one_line(line: str) -> None:
    assert line.strip()
    assert len(line) <= MAX_MESSAGE
    assert not controls(line), repr(line)


def controls(text: str, allowed: str = "") -> list[str]:
    """The characters of `text` that a terminal or a page takes for more than text."""
    return [c for c in text if c not in allowed and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def unescaped_tags(text: str) -> list[str]:
    """Elements that somebody's text has brought into a page."""
    return re.findall(r"<script>alert|<img|javascript:1\"", text, re.IGNORECASE)

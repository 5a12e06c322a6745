"""How figures and names are written: what strangers write cannot become more than text."""

import pytest
from markdown_it import MarkdownIt

from pytest_vram.errors import printable
from pytest_vram.report.text import code, display_name, gib, markdown, seconds, signed

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (0, "0.00"), (1, "0.00"), (1 << 30, "1.00"), (1600 << 20, "1.56"), (80 << 30, "80.00")],
)
def test_gib(value: int | None, expected: str) -> None:
    assert gib(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (0.0, "0.000"), (0.0124, "0.012"), (9.5, "9.500"), (10.0, "10.0"), (1e4, "10000.0")],
)
def test_seconds(value: float | None, expected: str) -> None:
    assert seconds(value) == expected


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (1.5, 2, "+1.50"),
        (-1.5, 2, "−1.50"),
        (0.0, 2, "0"),
        (-0.0, 2, "0"),
        (0.004, 2, "0"),
        (-0.004, 2, "0"),
        (-0.005001, 2, "−0.01"),
        (12.6, 0, "+13"),
        (-0.4, 0, "0"),
    ],
)
def test_a_difference_has_its_sign_and_a_true_minus(value: float, digits: int, expected: str) -> None:
    assert signed(value, digits) == expected


def test_a_model_has_its_aliases_behind_it() -> None:
    aliases = {"sdxl": ["xl", "sd-food"], "bare": []}
    assert display_name("sdxl", aliases) == "sdxl (xl, sd-food)"
    assert display_name("bare", aliases) == "bare"
    assert display_name("other", aliases) == "other"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sdxl/fp16", "sdxl/fp16"),
        ("a\nb\r\nc", "a b c"),
        ("  a \t b  ", "a b"),
        ("\x1b[31mred\x1b[0m", "[31mred [0m"),
        ("\x1b]8;;http://x\x07link", "]8;;http://x link"),
        ("a\x00b\x07c\x7fd\x9be", "a b c d e"),
        ("a\u202eb\u2066c\u200fd", "a b c d"),
        ("a\u2028b\u2029c\x85d", "a b c d"),
        ("a\u200bb\ufeffc\u00add", "a b c d"),
        ("a\U000e0041b", "a b"),
        ("a\ud800b", "a?b"),
        ("\udcff", "?"),
        ("测试 é ×", "测试 é ×"),
        ("\n\x1b\u202e", ""),
        ("", ""),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(text).encode().decode() == expected


HOSTILE = [
    "a|b",
    "a\\|b",
    "a\\",
    "\\",
    "`code`",
    "``a` b``",
    "<script>alert(1)</script>",
    "<!-- -->",
    "<b onclick=x>",
    "<http://x.example>",
    "&lt;b&gt;",
    "&#60;",
    "&amp;lt;",
    "**bold** __bold__ *i* _i_",
    "~~gone~~",
    "[text](http://x.example)",
    "![image](http://x.example)",
    "[ref]: http://x.example",
    "$x$",
    "a\nb",
    "a\n\n# heading",
    "a  \nb",
    "\x1b[31mred",
    "\u202ereversed",
    "half \ud800 a character",
    "tests/test_app.py::test_x[a-b]",
    "{{ 7 * 7 }} {% raw %}",
    "snake_case_name",
]


def shown(source: str) -> list[str]:
    """The texts that Markdown shows, one for each block that is text and nothing else."""
    texts = []
    for token in MARKDOWN.parse(source):
        if token.type == "inline":
            children = token.children or []
            kinds = {child.type for child in children} - {"text", "text_special"}
            assert not kinds, f"{source!r} became {kinds}"
            texts.append("".join(child.content for child in children))
    return texts


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    assert shown(f"Name: {markdown(text)}") == [f"Name: {printable(text)}"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_stays_in_its_cell(text: str) -> None:
    cells = shown(f"| one | two |\n|---|---|\n| {markdown(text)} | next |\n")
    assert cells == ["one", "two", printable(text), "next"]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_tag_and_no_line_comes_through(text: str) -> None:
    for written in (markdown(text), code(text)):
        assert not set(written) & set("<>\n\r\x1b\u202e")
        assert written.encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sdxl", "`sdxl`"),
        ("fp16+vae_tiling", "`fp16+vae_tiling`"),
        ("1024x1024, 49 frames", "`1024x1024, 49 frames`"),
        ("1024×768", "`1024×768`"),
        ("a\nb", "`a b`"),
        ("", ""),
        ("a`b", "a\\`b"),
        ("a|b", "a\\|b"),
        ("<script>", "&lt;script&gt;"),
        ("测试", "测试"),
    ],
)
def test_a_name_that_could_end_its_code_span_is_plain_text(text: str, expected: str) -> None:
    assert code(text) == expected


@pytest.mark.parametrize("text", ["sdxl", "fp16+vae_tiling", "a/b:c.d-e, f", "1024×768"])
def test_a_code_span_in_a_cell_shows_the_name(text: str) -> None:
    tokens = MARKDOWN.parse(f"| a | b |\n|---|---|\n| {code(text)} | next |\n")
    spans = [child for token in tokens for child in token.children or [] if child.type == "code_inline"]
    assert [span.content for span in spans] == [text]

"""Cards: the packaged file keeps its own rules, people's names find theirs, and a bad file is named."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.errors import UsageError
from pytest_vram.report.cards import GIB, PACKAGED, Card, find_card, read_cards

TEXT = PACKAGED.read_text(encoding="utf-8")
CARDS = read_cards()
OWN = {"name": "Team Card", "kind": "workstation", "memory_gib": 24, "visible_gib": 23.5}


def card(**changes: Any) -> Card:
    return Card.model_validate({**OWN, **changes})


def cards_file(path: Path, *cards: dict[str, Any]) -> Path:
    """A file of cards; of texts, lists, numbers and booleans JSON is TOML."""
    tables = ("".join(f"{key} = {json.dumps(value)}\n" for key, value in one.items()) for one in cards)
    path.write_text("".join(f"[[cards]]\n{table}\n" for table in tables), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    """The one line with which a file is refused, less its name."""
    with pytest.raises(UsageError) as caught:
        read_cards(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_no_packaged_card_hides_another() -> None:
    written = tomllib.loads(TEXT)["cards"]
    assert len(CARDS) == len(written) >= 50
    assert len({one["name"] for one in written}) == len(written)


@pytest.mark.parametrize("one", CARDS, ids=lambda card: card.name)
def test_a_packaged_card_keeps_the_rules(one: Card) -> None:
    for name in (one.name, *one.aliases):
        assert find_card(name, CARDS) is one
    assert one.visible_gib < one.memory_gib
    assert one.usable_bytes > 0
    nvidia = one.vendor == "nvidia"
    assert one.memory_only is not nvidia
    assert (one.reported_as is not None, one.capability is not None) == (nvidia, nvidia)
    if one.capability is not None:
        assert (one.bf16_tflops is not None) == (one.capability >= (8, 0))
        assert (one.fp8_tflops is not None) == (one.capability >= (8, 9))
        seen = int(one.visible_gib * GIB)
        assert [other.name for other in CARDS if other.is_gpu(one.reported_as, seen)] == [one.name]
    if one.kind in ("datacenter", "unified"):
        assert one.desktop_reserve_gib == 0


def test_no_name_is_used_twice() -> None:
    used: dict[str, str] = {}
    for one in CARDS:
        for name in {re.sub(r"[^a-z0-9]", "", text.lower()) for text in (one.name, *one.aliases)}:
            assert used.setdefault(name, one.name) == one.name
    aliases = [alias for one in CARDS for alias in one.aliases]
    assert len(set(aliases)) == len(aliases)


def test_every_entry_has_its_source_directly_below_its_head() -> None:
    entries = TEXT.split("\n[[cards]]\n")[1:]
    assert len(entries) == len(CARDS)
    for entry in entries:
        comment = entry[: entry.index("\nname = ")]
        assert all(line.startswith("# ") for line in comment.splitlines()), comment
        assert "visible: " in comment.replace("\n#  ", ""), comment


def test_the_keys_of_an_entry_stand_in_the_documented_order() -> None:
    order = list(Card.model_fields)
    for one in tomllib.loads(TEXT)["cards"]:
        assert list(one) == [key for key in order if key in one], one["name"]


def test_the_smallest_memory_comes_first() -> None:
    usable = [one.usable_bytes for one in CARDS]
    assert usable == sorted(usable)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 3060", "GeForce RTX 3060 12GB"),
        ("rtx3060", "GeForce RTX 3060 12GB"),
        ("RTX-3060", "GeForce RTX 3060 12GB"),
        ("3060", "GeForce RTX 3060 12GB"),
        ("geforce rtx 3060 8gb", "GeForce RTX 3060 8GB"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("  rtx_4090 ", "GeForce RTX 4090"),
        ("4090", "GeForce RTX 4090"),
        ("4090 laptop", "GeForce RTX 4090 Laptop"),
        ("3060 ti", "GeForce RTX 3060 Ti"),
        ("H100", "H100 80GB"),
        ("T4", "T4"),
        ("L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("7900 xtx", "Radeon RX 7900 XTX"),
        ("a770 16", "Arc A770 16GB"),
        ("Spark", "DGX Spark GB10"),
    ],
)
def test_a_card_is_found_by_the_name_that_people_write(text: str, name: str) -> None:
    assert find_card(text, CARDS).name == name


def not_found(text: str, cards: list[Card]) -> str:
    with pytest.raises(UsageError) as caught:
        find_card(text, cards)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_of_several_cards_is_answered_with_them() -> None:
    several = "--card: 'A100' may be any of A100 40GB, A100 80GB; write one of them in full"
    assert not_found("A100", CARDS) == several


def test_of_many_cards_six_are_named() -> None:
    message = not_found("Radeon", CARDS)
    assert message.count("Radeon RX") == 6
    assert ", ...; write one" in message


def test_an_alias_of_two_cards_is_answered_with_both() -> None:
    two = [card(name="One", aliases=["build server"]), card(name="Two", aliases=["Build-Server"])]
    assert "may be any of One, Two" in not_found("build server", two)


def test_a_name_is_stronger_than_an_alias_and_an_alias_than_a_part() -> None:
    cards = [card(name="A1", aliases=["X"]), card(name="X", aliases=["A"]), card(name="A", aliases=["B"])]
    assert find_card("x", cards).name == "X"
    assert find_card("a", cards).name == "A"
    assert find_card("b", [*cards, card(name="B plus")]).name == "A"


@pytest.mark.parametrize(
    ("text", "near"), [("RTX 5099", "GeForce RTX 5090"), ("GTX 1O80", "GeForce GTX 1080"), ("A1000", "A100")]
)
def test_an_unknown_card_is_answered_with_near_names(text: str, near: str) -> None:
    message = not_found(text, CARDS)
    assert message.startswith(f"--card: no card is called {text!r}; did you mean ")
    assert near in message


@pytest.mark.parametrize("text", ["", "  ", "-", "NVIDIA", "qqqqqqqq", "测试", "a\nb" * 20, "\ud800"])
def test_a_name_like_no_other_is_answered_without_a_guess(text: str) -> None:
    assert not_found(text, CARDS) == f"--card: no card is called {text!r} (`pytest-vram cards` lists them)"


def test_a_users_file_adds_a_card_and_it_is_a_headline(tmp_path: Path) -> None:
    cards = read_cards(cards_file(tmp_path / "cards.toml", OWN))
    assert len(cards) == len(CARDS) + 1
    assert find_card("team card", cards) == card(headline=True, desktop_reserve_gib=1.0)
    usable = [one.usable_bytes for one in cards]
    assert usable == sorted(usable)


@pytest.mark.parametrize("name", ["GeForce RTX 4090", "NVIDIA RTX-4090"])
def test_a_users_card_replaces_one_of_the_same_name(name: str, tmp_path: Path) -> None:
    cards = read_cards(cards_file(tmp_path / "cards.toml", {**OWN, "name": name}))
    assert len(cards) == len(CARDS)
    assert find_card("NVIDIA GeForce RTX 4090", cards) == card(name=name, headline=True, desktop_reserve_gib=1.0)


def test_a_later_file_replaces_an_earlier(tmp_path: Path) -> None:
    files = [
        cards_file(tmp_path / "1.toml", OWN, {**OWN, "name": "Only here"}),
        cards_file(tmp_path / "2.toml", {**OWN, "visible_gib": 20}),
    ]
    cards = read_cards(*files)
    assert len(cards) == len(CARDS) + 2
    assert find_card("Team Card", cards).visible_gib == 20


def test_cards_whose_names_are_of_other_alphabets_are_two(tmp_path: Path) -> None:
    names = ["显卡一", "显卡二"]
    cards = read_cards(cards_file(tmp_path / "cards.toml", *({**OWN, "name": name} for name in names)))
    assert {one.name for one in cards} >= set(names)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"colour": "red"}, "cards.0.colour: is not a key of this table"),
        ({"visible_gib": 24.1}, "cards.0.visible_gib: is above memory_gib, 24"),
        (
            {"visible_gib": 2, "desktop_reserve_gib": 2},
            "cards.0.desktop_reserve_gib: leaves nothing of the 2 GiB visible",
        ),
        (
            {"visible_gib": 2, "desktop_reserve_gib": 3},
            "cards.0.desktop_reserve_gib: leaves nothing of the 2 GiB visible",
        ),
        ({"memory_gib": 0}, "cards.0.memory_gib: input should be greater than 0"),
        ({"memory_gib": 5000}, "cards.0.memory_gib: "),
        ({"memory_gib": 10**4000}, "cards.0.memory_gib: "),
        ({"visible_gib": "much"}, "cards.0.visible_gib: "),
        ({"kind": "toaster"}, "cards.0.kind: "),
        ({"vendor": "apple"}, "cards.0.vendor: "),
        ({"name": ""}, "cards.0.name: "),
        ({"aliases": "TC"}, "cards.0.aliases: "),
        ({"bandwidth_gb_s": 0}, "cards.0.bandwidth_gb_s: "),
        ({"compute_capability": "8"}, "cards.0.compute_capability: "),
        ({"compute_capability": "8.6\n"}, "cards.0.compute_capability: "),
        ({"desktop_reserve_gib": -1}, "cards.0.desktop_reserve_gib: "),
    ],
)
def test_a_bad_card_is_refused_by_file_and_key(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    message = refusal(cards_file(tmp_path / "cards.toml", {**OWN, **changes}))
    assert message.startswith(problem)
    assert len(message) < 500


@pytest.mark.parametrize("number", [0, 2])
def test_a_bad_card_is_refused_by_its_place(number: int, tmp_path: Path) -> None:
    cards = [{**OWN, "name": f"Card {n}", "visible_gib": 25 if n == number else 20} for n in range(3)]
    assert refusal(cards_file(tmp_path / "cards.toml", *cards)).startswith(f"cards.{number}.visible_gib: ")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1979-05-27"])
@pytest.mark.parametrize("key", ["memory_gib", "visible_gib", "bandwidth_gb_s", "fp16_tflops", "desktop_reserve_gib"])
def test_what_is_no_number_is_refused(key: str, value: str, tmp_path: Path) -> None:
    path = cards_file(tmp_path / "cards.toml", {**OWN, key: 12345.5})
    path.write_text(path.read_text(encoding="utf-8").replace("12345.5", value), encoding="utf-8")
    assert refusal(path).startswith(f"cards.0.{key}: ")


@pytest.mark.parametrize("key", ["name", "kind", "memory_gib", "visible_gib"])
def test_a_card_needs(key: str, tmp_path: Path) -> None:
    lacking = {name: value for name, value in OWN.items() if name != key}
    assert refusal(cards_file(tmp_path / "cards.toml", lacking)).startswith(f"cards.0.{key}: field required")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "cards: field required"),
        (b"cards = []", "cards: "),
        (b"cards = 1", "cards: "),
        (b"card = 1\ncards = []", "card"),
        (b"hello", ""),
        (b"[[cards]", ""),
        (b"name = '\xff'", ""),
        (b'{"cards": []}', ""),
        (b"[[cards]]\nname = 1\nname = 2", ""),
        (b"[[cards]]\nmemory_gib = " + b"9" * 5000, ""),
        (b"cards = " + b"[" * 5000, ""),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_a_file_that_has_no_cards_is_named(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "cards.toml"
    path.write_bytes(content)
    assert refusal(path).startswith(problem)


def test_no_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.toml")
    assert "is no file" in refusal(tmp_path)


def test_usable_is_what_is_seen_less_what_the_desktop_holds() -> None:
    assert card(visible_gib=23.5, desktop_reserve_gib=1.25).usable_bytes == 22.25 * GIB
    assert card(visible_gib=23.5).usable_bytes == 23.5 * GIB


@pytest.mark.parametrize(
    ("capability", "optimizations", "lacking"),
    [
        ("7.5", ["bf16"], "bf16"),
        ("8.0", ["bf16"], None),
        ("8.6", ["fp8"], "fp8"),
        ("8.9", ["fp8"], None),
        ("10.0", ["bf16", "fp8"], None),
        ("7.5", ["vae_tiling", "fp8", "bf16"], "fp8"),
        ("6.1", ["fp16", "fp32", "vae_tiling"], None),
        ("6.1", [], None),
        (None, ["bf16", "fp8"], None),
    ],
)
def test_the_dtype_that_a_card_lacks(capability: str | None, optimizations: list[str], lacking: str | None) -> None:
    assert card(compute_capability=capability).lacks(optimizations) == lacking


GPU = "NVIDIA GeForce RTX 3060"


@pytest.mark.parametrize(
    ("name", "memory", "same"),
    [
        (GPU, 20 * GIB, True),
        (GPU, int(18.01 * GIB), True),
        (GPU, int(21.99 * GIB), True),
        (GPU, int(17.99 * GIB), False),
        (GPU, int(22.01 * GIB), False),
        (GPU, 8 * GIB, False),
        (GPU, 10**4000, False),
        (GPU, -(10**4000), False),
        (GPU, None, False),
        (GPU, 20.0 * GIB, False),
        ("NVIDIA GeForce RTX 3060 Ti", 20 * GIB, False),
        (None, 20 * GIB, False),
        (1, 20 * GIB, False),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_gpu_is_a_card_by_its_name_and_its_memory(name: object, memory: object, same: bool) -> None:
    assert card(reported_as=GPU, visible_gib=20).is_gpu(name, memory) is same


def test_a_card_that_no_driver_names_is_not_a_gpu_without_a_name() -> None:
    assert not card(reported_as=None, visible_gib=20).is_gpu(None, 20 * GIB)


def test_memory_alone_is_judged_where_there_is_no_cuda() -> None:
    assert [card(vendor=vendor).memory_only for vendor in ("nvidia", "amd", "intel")] == [False, True, True]

"""The page in a browser: filters, sorts, remembers, and says nothing in the console."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from pytest_vram.report.explorer import explorer
from pytest_vram.report.render import Report
from tests.records.test_schema import BARE, FAILURE, MIB, record
from tests.report.test_render import HOSTILE, a_report, a_run, estimate, hostile_run

CHROMIUM, CHROMEDRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver are not both on PATH"
)

CARD = "GeForce RTX 3060 12GB"
WORDS = {"f": "fits", "t": "tight", "q": "?", "n": "no", "u": "–"}
COLUMNS = (
    "model",
    "size",
    "batch",
    "verdict",
    "required",
    "set",
    "seconds",
    "saved",
    "paid",
    "frontier",
    "shown",
    "slowdown",
    "host",
    "disk",
    "runs",
)
ON_A_PHONE = ("model", "size", "batch", "verdict", "required", "set", "seconds", "runs")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = Chrome(options=options, service=Service(executable_path=CHROMEDRIVER))
    try:
        yield started
    finally:
        started.quit()


@pytest.fixture(scope="module")
def url(written: Report) -> str:
    return (written.folder / "hardware.html").resolve().as_uri()


@pytest.fixture(scope="module")
def opened(driver: Chrome, url: str) -> Chrome:
    """The page of the committed runs, opened once."""
    driver.get(url)
    return driver


@pytest.fixture
def page(opened: Chrome, url: str) -> Iterator[Chrome]:
    """That page as it opens, and with nothing in the console when the test ends."""
    if opened.current_url.split("#")[0] != url:
        opened.get(url)
    by_id(opened, "reset").click()
    console(opened)
    yield opened
    assert console(opened) == []


@pytest.fixture(scope="module")
def data(written: Report) -> list[dict[str, Any]]:
    """The explorer's rows."""
    made = json.loads(json.dumps(explorer(written.document())))
    return [dict(zip(made["columns"], row, strict=True)) for row in made["rows"]]


@pytest.fixture(scope="module")
def places(written: Report) -> dict[str, int]:
    """The place of each card's letter."""
    return {name: place for name, _, place in explorer(written.document())["cards"]}


def console(driver: Chrome) -> list[dict[str, Any]]:
    """What the browser's console said since it was last asked."""
    said: list[dict[str, Any]] = driver.get_log("browser")  # type: ignore[no-untyped-call]
    return said


def by_id(driver: Chrome, name: str) -> WebElement:
    return driver.find_element(By.ID, name)


def rows(driver: Chrome) -> list[dict[str, str]]:
    """What the table shows when all its rows were asked for, by column."""
    driver.execute_script("const more = document.getElementById('more'); while (!more.hidden) more.click();")
    return first_rows(driver)


def first_rows(driver: Chrome) -> list[dict[str, str]]:
    """What the table shows, by column."""
    script = "return [...document.querySelectorAll('#rows tr')].map(r => [...r.children].map(c => c.textContent))"
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in driver.execute_script(script)]


def names(shown: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What names each row, whatever else it says."""
    return [
        (row["model"], row["size"], str(row["batch"]), re.sub(r" \(.*", "", row["set"]), row["runs"].strip())
        for row in shown
    ]


def choose(driver: Chrome, control: str, value: str) -> None:
    """Choose from a list by typing, as people do; a click of the driver's on an option fires no event `input`."""
    by_id(driver, control).send_keys(value or Keys.HOME)
    assert by_id(driver, control).get_attribute("value") == value


def choose_at_once(driver: Chrome, control: str, value: str) -> None:
    """The same for names that nobody can type."""
    script = (
        "const c = document.getElementById(arguments[0]); c.value = arguments[1]; c.dispatchEvent(new Event('input'))"
    )
    driver.execute_script(script, control, value)
    assert by_id(driver, control).get_attribute("value") == value


def head(driver: Chrome, key: str) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, f"th[data-key={key}] button")


def sorted_as(driver: Chrome, key: str) -> str | None:
    return driver.find_element(By.CSS_SELECTOR, f"th[data-key={key}]").get_attribute("aria-sort")


def required(driver: Chrome) -> list[float]:
    """What the rows require, as far as it is known."""
    return required_of(rows(driver))


def required_of(shown: list[dict[str, str]]) -> list[float]:
    """What these rows require, as far as it is known."""
    return [float(row["required"].lstrip("~> ")) for row in shown if row["required"].lstrip("~> ") != "–"]


def seen(driver: Chrome) -> list[tuple[str, ...]]:
    """The columns that the heads and each row show on the screen, every kind of line once."""
    script = """
        const shown = (line) => [...line.children].map((cell, at) => cell.getClientRects().length ? at : -1);
        const lines = [...document.querySelectorAll('#find thead tr, #rows tr')];
        return [...new Set(lines.map((line) => JSON.stringify(shown(line).filter((at) => at >= 0))))].map(JSON.parse)
    """
    return [tuple(COLUMNS[at] for at in line) for line in driver.execute_script(script)]


def test_the_heads_are_those_of_the_columns(page: Chrome) -> None:
    heads = page.find_elements(By.CSS_SELECTOR, "#find thead th")
    assert [cell.get_attribute("data-key") for cell in heads] == [*COLUMNS[:-1], None]
    assert heads[-1].text == "runs"


def test_it_opens_with_every_choice_and_nothing_in_the_console(
    driver: Chrome, url: str, data: list[dict[str, Any]]
) -> None:
    driver.get("about:blank")
    console(driver)
    driver.get(url)
    assert names(rows(driver)) == names(data)
    assert str(len(data)) in by_id(driver, "count").text
    assert console(driver) == []


def number(cell: str) -> float | None:
    """A cell's signed figure; None where it says that there is none."""
    return None if cell == "–" else float(cell.replace("−", "-"))


def test_the_cells_are_the_explorer_s_figures(page: Chrome, data: list[dict[str, Any]]) -> None:
    for shown, row in zip(rows(page), data, strict=True):
        if row["required"] is not None:
            mark = "> " if "out of memory" in row["remark"] else "~" if row["estimated"] else ""
            assert shown["required"] == f"{mark}{row['required']:.2f}"
        for key, digits in (("shown", 2), ("host", 2), ("disk", 2)):
            assert shown[key] == ("–" if row[key] is None else f"{row[key]:.{digits}f}")
        if row["seconds"] is None:
            assert shown["seconds"] == "–"
        else:
            assert float(shown["seconds"]) == pytest.approx(row["seconds"], rel=0.005)
        for key in ("saved", "paid"):
            assert number(shown[key]) == row[key]
            assert (row[key] or 0) <= 0 or shown[key].startswith("+")
        assert shown["slowdown"] == ("–" if row["slowdown"] is None else f"×{row['slowdown']:.2f}")
        assert shown["frontier"] == ("●" if row["frontier"] else "")
        assert shown["set"] == row["set"] + (f" ({row['remark']})" if row["remark"] else "")
        assert shown["runs"].split() == row["runs"].split()
        assert shown["verdict"] == "", "no card is chosen"
    for key in ("paid", "saved", "slowdown", "seconds"):
        assert len({row[key] is None for row in data}) == 2, "both kinds were seen"
    assert {row["frontier"] for row in data} == {0, 1}


def test_the_verdict_is_seen_once_there_is_a_card(page: Chrome) -> None:
    assert seen(page) == [tuple(key for key in COLUMNS if key != "verdict")]
    choose(page, "card", CARD)
    assert seen(page) == [COLUMNS]
    by_id(page, "reset").click()
    assert seen(page) == [tuple(key for key in COLUMNS if key != "verdict")]


def test_filter_by_model(page: Chrome, data: list[dict[str, Any]]) -> None:
    model = "sdxl-turbo"
    choose(page, "model", model)
    assert names(rows(page)) == names([row for row in data if row["model"] == model]) != []


def test_filter_by_memory(page: Chrome, data: list[dict[str, Any]]) -> None:
    by_id(page, "memory").send_keys("8.06")
    expected = [row for row in data if (row["required"] or 1000) <= 8.06]
    assert 0 < len(expected) < len(data)
    assert names(rows(page)) == names(expected)
    for _ in "8.06":
        by_id(page, "memory").send_keys(Keys.BACKSPACE)
    assert len(rows(page)) == len(data)


def test_filters_that_leave_nothing_say_so(page: Chrome, data: list[dict[str, Any]]) -> None:
    by_id(page, "memory").send_keys("0")
    assert rows(page) == []
    assert by_id(page, "count").text.startswith(f"0 of {len(data)}")


@pytest.mark.parametrize("card", [CARD, "GeForce GTX 1650"])
def test_a_card_shows_the_set_to_take(
    card: str, page: Chrome, data: list[dict[str, Any]], places: dict[str, int]
) -> None:
    choose(page, "card", card)
    expected = [row for row in data if row["verdicts"][places[card]].isupper()]
    shown = rows(page)
    assert names(shown) == names(expected)
    workloads = {(row["model"], row["size"], str(row["batch"])) for row in shown}
    assert len(workloads) == len(shown)
    for key in {(row["model"], row["size"], str(row["batch"])) for row in data} - workloads:
        own = [row for row in data if (row["model"], row["size"], str(row["batch"])) == key]
        assert {row["verdicts"][places[card]] for row in own} <= set("nqu"), "only a larger workload runs"
    assert [row["verdict"].lstrip("~") for row in shown] == [
        WORDS[row["verdicts"][places[card]].lower()] for row in expected
    ]


def test_a_card_shows_every_set_where_that_is_wanted(
    page: Chrome, data: list[dict[str, Any]], places: dict[str, int]
) -> None:
    choose(page, "card", CARD)
    fewer = len(rows(page))
    by_id(page, "best").click()
    shown = rows(page)
    assert len(shown) == len(data) > fewer
    for cells, row in zip(shown, data, strict=True):
        guess = "~" if row["estimated"] else ""
        assert cells["verdict"] == guess + WORDS[row["verdicts"][places[CARD]].lower()]
    by_id(page, "best").click()
    assert len(rows(page)) == fewer


def test_only_the_set_to_take_asks_for_a_card(page: Chrome) -> None:
    assert not by_id(page, "best").is_enabled()
    choose(page, "card", CARD)
    assert by_id(page, "best").is_enabled()


def test_all_filters_together(page: Chrome, data: list[dict[str, Any]], places: dict[str, int]) -> None:
    choose(page, "model", "sdxl-turbo")
    choose(page, "card", CARD)
    by_id(page, "memory").send_keys("12")
    expected = [
        row
        for row in data
        if row["model"] == "sdxl-turbo" and (row["required"] or 1000) <= 12 and row["verdicts"][places[CARD]].isupper()
    ]
    assert names(rows(page)) == names(expected) != []


def test_sort_by_click(page: Chrome, data: list[dict[str, Any]]) -> None:
    head(page, "required").click()
    up = required(page)
    assert up == sorted(row["required"] for row in data if row["required"])
    assert sorted_as(page, "required") == "ascending"
    head(page, "required").click()
    assert required(page) == up[::-1]
    assert sorted_as(page, "required") == "descending"
    head(page, "seconds").click()
    assert (sorted_as(page, "required"), sorted_as(page, "seconds")) == ("none", "ascending")


def test_sort_by_keyboard(page: Chrome, data: list[dict[str, Any]]) -> None:
    by_id(page, "reset").send_keys(Keys.TAB)
    for _ in range(20):
        focused = page.switch_to.active_element
        if focused.text.startswith("required"):
            break
        focused.send_keys(Keys.TAB)
    focused.send_keys(Keys.ENTER)
    up = required(page)
    assert up == sorted(row["required"] for row in data if row["required"])
    assert page.switch_to.active_element == focused, "the focus stays where it is"
    focused.send_keys(Keys.ENTER)
    assert required(page) == up[::-1]


@pytest.mark.parametrize("key", ["size", "slowdown"])
def test_what_is_not_known_is_last_in_either_order(key: str, page: Chrome, data: list[dict[str, Any]]) -> None:
    column = "pixels" if key == "size" else key
    known = sorted((row for row in data if row[column] is not None), key=lambda row: row[column])
    for reverse in (False, True):
        head(page, key).click()
        shown = rows(page)
        by_name = {name: row[column] for name, row in zip(names(data), data, strict=True)}
        values = [by_name[name] for name in names(shown)]
        ordered = sorted((row[column] for row in known), reverse=reverse)
        assert values == [*ordered, *[None] * (len(data) - len(known))]


def test_sort_by_verdict_has_what_fits_first(page: Chrome) -> None:
    choose(page, "card", CARD)
    by_id(page, "best").click()
    head(page, "verdict").click()
    shown = [row["verdict"].lstrip("~") for row in rows(page)]
    assert shown == sorted(shown, key=["fits", "tight", "?", "no", "–"].index)
    assert len(set(shown)) > 2


def test_reset(page: Chrome, data: list[dict[str, Any]]) -> None:
    choose(page, "model", "sdxl")
    choose(page, "card", CARD)
    by_id(page, "best").click()
    by_id(page, "memory").send_keys("9")
    head(page, "required").click()
    by_id(page, "reset").click()
    assert names(rows(page)) == names(data)
    assert [by_id(page, name).get_attribute("value") for name in ("model", "card", "memory")] == ["", "", ""]
    assert sorted_as(page, "required") == "none"
    choose(page, "card", CARD)
    assert by_id(page, "best").is_selected()


def reopen(page: Chrome, address: str) -> None:
    page.get("about:blank")
    page.get(address)


def test_a_run_s_link_leads_to_the_run_and_the_address_stays(page: Chrome) -> None:
    choose(page, "model", "sdxl")
    address = page.current_url
    link = page.find_element(By.CSS_SELECTOR, "#rows td.runs a")
    tag = link.text
    link.send_keys(Keys.ENTER)
    assert page.switch_to.active_element.get_attribute("id") == tag
    assert page.current_url == address


def test_the_address_restores_what_was_chosen(page: Chrome) -> None:
    choose(page, "model", "sdxl")
    choose(page, "card", CARD)
    by_id(page, "best").click()
    by_id(page, "memory").send_keys("13")
    head(page, "required").click()
    head(page, "required").click()
    before, address = rows(page), page.current_url
    assert len(before) > 1
    assert "#" in address
    reopen(page, address)
    assert rows(page) == before
    chosen = [by_id(page, name).get_attribute("value") for name in ("model", "card", "memory")]
    assert chosen == ["sdxl", CARD, "13"]
    assert not by_id(page, "best").is_selected()
    assert sorted_as(page, "required") == "descending"


@pytest.mark.parametrize("hash_", ["R1", "memory=lots&sort=-", "%=&=sort=__proto__"])
def test_an_address_that_says_nothing_shows_everything(
    hash_: str, page: Chrome, url: str, data: list[dict[str, Any]]
) -> None:
    reopen(page, f"{url}#{hash_}")
    assert names(rows(page)) == names(data)


def test_an_address_with_a_name_of_another_page_shows_everything(
    page: Chrome, url: str, data: list[dict[str, Any]]
) -> None:
    reopen(page, f"{url}#model=gone&card=gone")
    assert names(rows(page)) == names(data)
    for control in ("model", "card"):
        assert Select(by_id(page, control)).first_selected_option.text.startswith(("all", "any"))


def test_a_row_leads_to_each_of_its_runs(page: Chrome, data: list[dict[str, Any]]) -> None:
    script = """return [...document.querySelectorAll('#rows tr')].map((row) =>
        [...row.querySelectorAll('a')].map((link) => [link.textContent, link.getAttribute('href')]))"""
    assert len(rows(page)) == len(data)
    assert page.execute_script(script) == [[[tag, "#" + tag] for tag in row["runs"].split()] for row in data]
    place = next(place for place, row in enumerate(data) if " " in row["runs"])
    links = page.find_elements(By.CSS_SELECTOR, f"#rows tr:nth-child({place + 1}) a")
    assert len(links) > 1
    for link in links:
        tag = link.text
        target = by_id(page, tag)
        link.click()
        assert target.tag_name == "tr"
        assert target.find_element(By.CSS_SELECTOR, "th").text == tag
        assert page.switch_to.active_element == target


def test_the_page_does_not_scroll_sideways_on_a_phone(page: Chrome) -> None:
    screen = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        for card in ("", CARD):
            choose(page, "card", card)
            wide, inner = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
            assert inner == 390
            assert wide <= inner
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(("width", "narrow"), [(390, True), (640, True), (641, False)])
def test_a_narrow_screen_has_fewer_columns(width: int, narrow: bool, page: Chrome) -> None:
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        for card in (CARD, ""):
            choose(page, "card", card)
            wanted = ON_A_PHONE if narrow else COLUMNS
            assert seen(page) == [tuple(key for key in wanted if card or key != "verdict")]
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_picture_is_drawn(page: Chrome) -> None:
    widths = page.execute_script("return [...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert len(widths) > 0
    assert all(widths)


def test_ten_thousand_rows_are_shown_in_portions(
    driver: Chrome, url: str, written: Report, tmp_path: Path, data: list[dict[str, Any]]
) -> None:
    text = (written.folder / "hardware.html").read_text(encoding="utf-8")
    start = text.index(">", text.index('id="data"')) + 1
    end = text.index("</script>", start)
    island = json.loads(text[start:end])
    at = island["columns"].index("required")
    one = island["rows"][0]
    island["rows"] = [[*one[:at], 1 + number % 997 / 10, *one[at + 1 :]] for number in range(10_000)]
    path = tmp_path / "many.html"
    path.write_text(text[:start] + json.dumps(island) + text[end:], encoding="utf-8")
    driver.get(path.as_uri())
    assert len(first_rows(driver)) == 200
    assert "10000" in by_id(driver, "count").text
    by_id(driver, "more").click()
    assert len(first_rows(driver)) == 400
    head(driver, "required").click()
    shown = first_rows(driver)
    assert len(shown) == 200, "a new order starts from its top"
    assert required_of(shown) == sorted(required_of(shown))
    assert max(required_of(shown)) < 3.5
    by_id(driver, "memory").send_keys("1")
    assert len(first_rows(driver)) == 11
    assert not by_id(driver, "more").is_displayed()
    assert console(driver) == []


def test_what_ran_out_of_memory_requires_more_and_may_be_not_known(driver: Chrome, tmp_path: Path) -> None:
    oom = record(case={"optimizations": ["bf16"]}, status="oom", failure=FAILURE, time={}, memory=BARE, id="oom")
    no_effect = record(case={"batch_size": 2}, effects={"vae_tiling": "no_effect"}, id="2")
    made = a_report(a_run(oom, no_effect, estimate(case={"batch_size": 4}, id="4")))
    path = tmp_path / "oom.html"
    path.write_text(made.html(made.document(), ()), encoding="utf-8")
    driver.get(path.as_uri())
    assert [(row["required"], row["set"]) for row in rows(driver)] == [
        ("> 79.18", "bf16 (out of memory)"),
        ("12.49", "fp16 (no effect: vae_tiling)"),
        ("~12.47", "fp16"),
    ]
    assert [row["seconds"] for row in rows(driver)] == ["–", "2.000", "–"]
    for card, words in (
        ("GeForce GTX 1650", ["–", "no", "~no"]),
        ("GeForce RTX 4090", ["no", "fits", "~fits"]),
        ("B200", ["?", "fits", "~fits"]),
    ):
        choose_at_once(driver, "card", card)
        if by_id(driver, "best").is_selected():
            by_id(driver, "best").click()
        assert [row["verdict"] for row in rows(driver)] == words, card
    marks = driver.find_elements(By.CSS_SELECTOR, "#rows .v")
    assert [mark.get_attribute("class") for mark in marks] == ["v unknown", "v fits", "v fits estimated"]
    head(driver, "verdict").click()
    assert [row["verdict"] for row in rows(driver)] == ["fits", "~fits", "?"]
    assert console(driver) == []


def test_a_card_on_which_only_a_larger_workload_runs_shows_that_one(driver: Chrome, tmp_path: Path) -> None:
    case = {"optimizations": ["fp16", "model_offload"], "batch_size": 4}
    memory = {"need_bytes": 4000 * MIB, "required_bytes": 4686 * MIB}
    made = a_report(a_run(record(), record(case=case, memory=memory, id="more")))
    path = tmp_path / "larger.html"
    path.write_text(made.html(made.document(), ()), encoding="utf-8")
    driver.get(path.as_uri())
    for card, shown in (
        ("GeForce RTX 4060", [("4", "fits")]),
        ("GeForce RTX 4090", [("1", "fits"), ("4", "fits")]),
        ("GeForce GTX 1060 3GB", [("1", "no"), ("4", "no")]),
    ):
        choose_at_once(driver, "card", card)
        assert [(row["batch"], row["verdict"]) for row in rows(driver)] == shown, card
    assert console(driver) == []


def test_hostile_names_are_text_and_found(driver: Chrome, tmp_path: Path) -> None:
    made = a_report(*(hostile_run(text, f"{kind}.json") for kind, text in HOSTILE.items() if kind != "escapes"))
    document = made.document()
    path = tmp_path / "hostile.html"
    path.write_text(made.html(document, ()), encoding="utf-8")
    driver.get(path.as_uri())
    island = explorer(document)
    assert len(rows(driver)) == len(island["rows"])
    shown = [row["model"] for row in rows(driver)]
    assert shown == [row[0] for row in island["rows"]]
    for model in list(dict.fromkeys(shown))[::4]:
        choose_at_once(driver, "model", model)
        assert {row["model"] for row in rows(driver)} == {model}
        address = driver.current_url
    reopen(driver, address)
    assert {row["model"] for row in rows(driver)} == {model}
    assert console(driver) == []

"""The charts: drawn from what there is, legible on light and dark pages, and no trace left in matplotlib."""

import re
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from pytest_vram.records.schema import Record
from pytest_vram.report.charts import CHARTS, MOST_LINES, MOST_PANELS, MOST_ROWS, Facts, draw
from pytest_vram.report.document import Document
from pytest_vram.report.drawing import short, style
from pytest_vram.report.evidence import gather
from pytest_vram.report.render import Report
from tests.records.test_schema import BARE, FAILURE, MIB, own, record
from tests.report.test_render import H100, a_report, a_run, estimate, svgs

FUNCTIONS: dict[str, Callable[[Facts], Figure | None]] = {function.__name__: function for function, _, _ in CHARTS}


def facts_of(*records: Record) -> Facts:
    report = a_report(a_run(*records))
    document = report.document()
    return Facts(document.evidence, document.leads, report.cards)


def words(figure: Figure) -> list[str]:
    """Every text in a figure."""
    return [text for found in figure.findobj(Text) if (text := found.get_text())]


def drawn(name: str, facts: Facts) -> Figure:
    with style():
        figure = FUNCTIONS[name](facts)
    assert figure is not None
    return figure


@pytest.fixture(scope="module")
def committed_facts(report: Report, document: Document) -> Facts:
    return Facts(document.evidence, document.leads, report.cards)


@pytest.fixture(scope="module")
def charts(written: Report) -> dict[str, tuple[bytes, bytes]]:
    """The written charts: SVG and PNG by name."""
    folder = written.folder / "charts"
    return {path.stem: (path.read_bytes(), path.with_suffix(".png").read_bytes()) for path in folder.glob("*.svg")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_drawn_from_nothing(name: str) -> None:
    assert FUNCTIONS[name](Facts(gather([]), {}, [])) is None
    assert FUNCTIONS[name](facts_of()) is None


def test_no_card_has_no_map(committed_facts: Facts) -> None:
    assert FUNCTIONS["models_on_cards"](replace(committed_facts, cards=[])) is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_failures_draw_nothing(name: str) -> None:
    failed = record(status="error", failure=FAILURE, time={}, memory=BARE)
    assert FUNCTIONS[name](facts_of(failed)) is None


@pytest.mark.parametrize(
    "records",
    [
        [record(status="oom", failure=FAILURE, time={}, memory=BARE)],
        [record(status="oom", failure=FAILURE, time={}, memory=BARE), record(case={"batch_size": 4}, id="4")],
        [own()],
        [own(), record()],
        [estimate(), estimate(case={"batch_size": 4}, id="4")],
        [record(memory={"weights_bytes": None, "context_bytes": None, "nvml_process_peak_bytes": None})],
        [record(time={"workers": [{"rounds_s": [1e-6], "median_s": 1e-6}], "median_s": 1e-6})],
        [record(phases={"denoise": {}}), record(case={"optimizations": ["bf16"]}, id="bf16")],
        [record(case={"width": 8, "height": 8}), record(case={"width": 100_000, "height": 100_000}, id="large")],
    ],
    ids=["oom", "oom and one", "own", "own and one", "estimates", "nulls", "fast", "phases", "sizes"],
)
def test_little_evidence_is_drawn_with_no_warning(records: list[Record]) -> None:
    for chart in svgs(a_report(a_run(*records))):
        assert ElementTree.fromstring(chart).tag.endswith("svg")


def test_the_committed_runs_draw_every_chart(charts: dict[str, tuple[bytes, bytes]]) -> None:
    assert charts.keys() == {name.replace("_", "-") for name in FUNCTIONS}


@pytest.mark.parametrize("name", [name.replace("_", "-") for name in FUNCTIONS])
def test_svg_follows_the_reader_s_scheme(name: str, charts: dict[str, tuple[bytes, bytes]]) -> None:
    svg = charts[name][0]
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = svg.decode("utf-8")
    assert "currentColor" in text
    [first] = [element.text or "" for element in root if element.tag.endswith("}style")]
    dark = re.search(r"@media\s*\(prefers-color-scheme:\s*dark\)\{svg\{color:(#\w+);--paper:(#\w+)\}\}", first)
    assert dark is not None
    assert dark[1] != dark[2]
    assert "background:var(--paper)" in first
    assert not re.search("#ffffff|white", text.replace(first, "")), "no paper of one scheme alone"
    assert "<dc:date>" not in text


@pytest.mark.parametrize("name", [name.replace("_", "-") for name in FUNCTIONS])
def test_png_is_png_of_the_same_shape(name: str, charts: dict[str, tuple[bytes, bytes]]) -> None:
    svg, png = charts[name]
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png[12:16] == b"IHDR"
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    root = ElementTree.fromstring(svg)
    points = [float(root.attrib[name].removesuffix("pt")) for name in ("width", "height")]
    assert points[0] / points[1] == pytest.approx(width / height, rel=0.01)


def models(count: int, *changes: dict[str, object]) -> list[Record]:
    """Records of many models, one for each of the changes."""
    made = []
    for number in range(count):
        for index, change in enumerate(changes or ({},)):
            case = {"model": f"model-{number:02}", **change}
            phases = {"denoise": {"time_s": 1.0, "allocated_peak_bytes": 9000 * MIB}}
            made.append(record(id=f"{number}/{index}", case=case, phases=phases))
    return made


BATCHES: tuple[dict[str, object], ...] = ({"batch_size": 1}, {"batch_size": 4})
SIZES: tuple[dict[str, object], ...] = ({"width": 512}, {"width": 1024})
SETS: tuple[dict[str, object], ...] = ({}, {"optimizations": ["fp16", "vae_tiling"]})


@pytest.mark.parametrize(
    ("name", "most", "changes"),
    [
        ("models_on_cards", MOST_ROWS, ({},)),
        ("required_by_model", MOST_ROWS, ({},)),
        ("shown_and_needed", MOST_ROWS, ({},)),
        ("phases", MOST_ROWS, ({},)),
        ("memory_by_batch", MOST_LINES, BATCHES),
        ("memory_by_resolution", MOST_LINES, SIZES),
        ("frontiers", MOST_PANELS, SETS),
    ],
)
def test_a_chart_says_how_much_it_does_not_show(name: str, most: int, changes: tuple[dict[str, object], ...]) -> None:
    def said(count: int) -> tuple[set[str], list[str]]:
        texts = words(drawn(name, facts_of(*models(count, *changes))))
        shown = {found for text in texts for found in re.findall(r"model-\d\d", text)}
        return shown, [text for text in texts if re.search(r"\d+ more \w+ in the tables", text)]

    shown, more = said(most)
    assert (len(shown), more) == (most, [])
    shown, more = said(most + 3)
    assert len(shown) == most
    assert len(more) == 1
    assert "3 more" in more[0]


def test_the_frontier_is_of_the_workload_with_most_sets_and_begins_with_the_model_with_most() -> None:
    video = {"model": "b", "width": 512, "frames": 33}
    sets = [record(id=f"b/{n}", case={**video, "optimizations": ["fp16", n]}) for n in ("vae_tiling", "vae_slicing")]
    lead = record(id="b", case={"model": "b", "width": 512, "frames": 81})
    texts = words(drawn("frontiers", facts_of(*models(1, *SETS), lead, *sets, record(id="b/33", case=video))))
    titles = [text.split("\n") for text in texts if "batch" in text]
    assert [title[0] for title in titles] == ["b", "model-00"]
    assert "33 frames" in titles[0][1]


def places(line: Line2D) -> list[list[float]]:
    found: list[list[float]] = np.asarray(line.get_xydata()).tolist()
    return found


@pytest.mark.parametrize("simulated", [True, False])
def test_a_frontier_has_what_was_timed_and_what_is_simulated_is_hollow(simulated: bool) -> None:
    memory = {"need_bytes": None, "required_bytes": None, "estimated_need_bytes": 2000 * MIB} if simulated else {}
    offload = record(id="b", case={"optimizations": ["fp16", "model_offload"]}, memory=memory)
    figure = drawn("frontiers", facts_of(record(), offload))
    line, *points, _ = figure.axes[0].lines
    hollow = {point.get_markerfacecolor() != point.get_color() for point in points}
    assert len(points) == 2
    assert hollow == ({True, False} if simulated else {False})
    assert any("hollow" in text for text in words(figure)) is simulated
    squares = [place for point in points if point.get_marker() == "s" for place in places(point)]
    assert sorted(squares) == sorted(places(line))


def test_lines_with_most_points_come_first() -> None:
    few = [record(id=f"a/{n}", case={"model": "a", "batch_size": n}) for n in (1, 4)]
    many = [record(id=f"b/{n}", case={"model": "b", "batch_size": n}) for n in (1, 2, 4)]
    figure = drawn("memory_by_batch", facts_of(*few, *many))
    assert [text for text in words(figure) if text.endswith(" fp16")] == ["b fp16", "a fp16"]


def test_a_point_is_hollow_only_where_no_gpu_has_searched_the_need() -> None:
    searched = [record(id=str(n), case={"batch_size": n}) for n in (1, 4)]
    memory = {"need_bytes": None, "required_bytes": None, "estimated_need_bytes": 9000 * MIB}
    guessed = [record(id=str(n), case={"batch_size": n}, memory=memory) for n in (1, 4, 8)]
    flagged = [
        record(id=f"{flag}/{n}", case={"batch_size": n, "optimizations": ["fp16", flag]})
        for n in (1, 4)
        for flag in ("vae_tiling", "vae_slicing")
    ]
    leads = a_run(*guessed, *flagged, environment={**H100, "gpu": "NVIDIA H200"})
    report = a_report(a_run(*searched), leads)
    document = report.document()
    figure = drawn("memory_by_batch", Facts(document.evidence, document.leads, report.cards))
    line, hollow = figure.axes[0].lines[:2]
    assert [x for x, _ in places(line)] == [1, 4, 8]
    assert [x for x, _ in places(hollow)] == [8]


def test_the_bar_of_a_model_is_that_of_its_dtype_alone_if_only_estimated() -> None:
    flagged = record(case={"optimizations": ["fp16", "sequential_offload"]})
    assert any("sequential_offload" in text for text in words(drawn("required_by_model", facts_of(flagged))))
    report = a_report(a_run(flagged), a_run(estimate(), gpu=None))
    document = report.document()
    texts = words(drawn("required_by_model", Facts(document.evidence, document.leads, report.cards)))
    assert not any("sequential_offload" in text for text in texts)
    assert any("~" in text for text in texts)


def test_estimates_are_marked_in_the_map_and_the_bars() -> None:
    for name in ("models_on_cards", "required_by_model"):
        assert any("~" in text for text in words(drawn(name, facts_of(estimate()))))
        assert not any("~" in text for text in words(drawn(name, facts_of(record()))))


def test_names_are_text_and_no_formula() -> None:
    texts = words(drawn("required_by_model", facts_of(record(case={"model": "$x^2$"}))))
    assert any("$x^2$" in text for text in texts)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_long_name_is_cut_in_the_middle(name: str, committed_facts: Facts) -> None:
    long = [record(id=f"{case}", case={"model": "n" * 200, **case}) for case in (*BATCHES, *SIZES[:1], *SETS[1:])]
    figure = FUNCTIONS[name](facts_of(*long))
    if figure is not None:
        assert max(len(line) for text in words(figure) for line in text.split("\n")) < 120


def test_drawing_leaves_matplotlib_as_it_was_and_keeps_no_figure() -> None:
    with matplotlib.rc_context({"font.size": 31.0, "axes.grid": False, "svg.fonttype": "none"}):
        before = dict(matplotlib.rcParams)
        few = facts_of(record())
        assert draw(few)
        assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


def test_drawing_leaves_matplotlib_as_it_was_also_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(facts: Facts) -> Figure | None:
        raise ZeroDivisionError

    monkeypatch.setattr("pytest_vram.report.charts.CHARTS", ((broken, "", ""),))
    before = dict(matplotlib.rcParams)
    with pytest.raises(ZeroDivisionError):
        draw(facts_of(record()))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [("abc", 3, "abc"), ("abcdefg", 5, "ab…fg"), ("a\n b\tc", 9, "a b c"), ("", 5, "")],
)
def test_short(text: str, length: int, expected: str) -> None:
    assert short(text, length) == expected

"""The documents: complete, well formed whatever names the runs hold, the same bytes from the same runs."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pytest_vram.cases.case import OwnCase
from pytest_vram.cases.models import Model, read_models
from pytest_vram.errors import UsageError, printable
from pytest_vram.records.files import Refused
from pytest_vram.records.reading import ReadRun, read_runs
from pytest_vram.records.schema import Record, Run
from pytest_vram.report.cards import Card, read_cards
from pytest_vram.report.charts import CHARTS, Chart, Facts
from pytest_vram.report.document import Document, Table
from pytest_vram.report.drawing import style, svg
from pytest_vram.report.render import Report
from tests.records.test_schema import BARE, FAILURE, MIB, facts, own, record

H100 = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "gpu_memory_bytes": 81079 * MIB,
    "driver": "580.1",
    "torch": "2.11.0",
    "diffusers": "0.42.1",
    "commit": "1a2b3c4",
    "started": "2026-11-23T00:00:00+00:00",
}
ESTIMATED = {"need_bytes": 12000 * MIB, "estimated_need_bytes": 12000 * MIB, "required_bytes": 12768 * MIB}


def a_run(*records: Record, path: str = "run.json", refused: tuple[str, ...] = (), **changes: Any) -> ReadRun:
    """A run of these records, on an H100 unless `environment` says otherwise."""
    run = {"environment": H100, "sweep": "default", **changes, "records": list(records)}
    return ReadRun(Path(path), Run(**run), tuple(Refused(None, problem) for problem in refused))


@cache
def packaged() -> tuple[list[Card], dict[str, Model]]:
    """The cards and models that come with the package."""
    return read_cards(), read_models()


def a_report(*runs: ReadRun, folder: Path = Path()) -> Report:
    return Report(runs, *packaged(), folder)


def estimate(**changes: Any) -> Record:
    """A record that was made with no GPU."""
    memory = {**BARE, **ESTIMATED, **changes.pop("memory", {})}
    return record(method="estimated", time={}, memory=memory, **changes)


def tables(text: str) -> dict[str, list[list[str]]]:
    """The tables of a Markdown text by the heading above them, as rows of cells."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if re.match("#+ ", line):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            assert line.endswith("|")
            found.setdefault(heading, []).append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def well_formed(text: str) -> dict[str, list[list[str]]]:
    """The tables, once each is known to have a delimiter row, and as many cells in each row as its header."""
    found = tables(text)
    for heading, rows in found.items():
        assert len(rows) > 1, heading
        assert rows[1] == ["---"] * len(rows[0]), heading
        assert {len(row) for row in rows} == {len(rows[0])}, heading
    return found


class Page(HTMLParser):
    """What a browser sees: the tags with their attributes, and the text in each kind of tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag in ("script", "style"):
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self.open.append("/" + tag)

    def handle_data(self, data: str) -> None:
        self.texts.setdefault("all", []).append(data)
        if self.open and self.open[-1] in ("script", "style"):
            self.texts[self.open[-1]][-1] += data

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        """Its tags and the names of their attributes."""
        return [(tag, tuple(attributes)) for tag, attributes in self.tags]

    @property
    def island(self) -> Any:
        """The JSON that the script reads."""
        return json.loads(self.texts["script"][0])

    def values(self, name: str) -> list[str]:
        """Every value of an attribute."""
        return [value or "" for _, attributes in self.tags for key, value in attributes.items() if key == name]


def markdown(report: Report) -> str:
    return report.markdown(report.document(), ())


def html(report: Report) -> Page:
    return Page(report.html(report.document(), ()))


def svgs(report: Report) -> list[bytes]:
    """Every chart that the report would draw."""
    document = report.document()
    found = []
    for function, _, _ in CHARTS:
        with style():
            figure = function(Facts(document.evidence, document.leads, report.cards))
            if figure is not None:
                found.append(svg(figure))
    return found


@pytest.fixture(scope="module")
def text(report: Report, document: Document, pictures: list[Chart]) -> str:
    return report.markdown(document, pictures)


@pytest.fixture(scope="module")
def page(report: Report, document: Document, pictures: list[Chart]) -> Page:
    return Page(report.html(document, pictures))


# What it says of the runs in results/


def test_the_document_has_every_table(text: str, report: Report, document: Document) -> None:
    found = well_formed(text)
    expected: list[Table] = [table for table in report.tables(document).values() if table.rows]
    assert len(found) == len(expected)
    for table in expected:
        assert any(heading.replace("\\", "") == table.title for heading in found)
    assert {"Models on cards", "sdxl", "Runs"} <= found.keys()


def test_every_row_names_a_run_of_the_runs_table(text: str) -> None:
    found = well_formed(text)
    known = {row[0] for row in found["Runs"][2:]}
    for heading, (header, _, *rows) in found.items():
        if heading != "Runs":
            assert header[-1] in ("run", "runs"), heading
            for row in rows:
                used = row[-1].split()
                assert used, (heading, row)
                assert set(used) <= known, (heading, row)


def test_the_runs_table_names_every_file(text: str, committed: list[ReadRun]) -> None:
    rows = well_formed(text)["Runs"][2:]
    assert len(rows) == len(committed)
    for row, run in zip(rows, committed, strict=True):
        assert row[1] == f"`{run.path.name}`"
        assert str(len(run.records)) in row
        assert any(cell.startswith(str(run.run.environment["commit"])[:12]) for cell in row)


def test_no_choice_and_no_workload_is_missing(text: str, document: Document) -> None:
    found = well_formed(text)
    choices = document.evidence.choices
    assert len(found["Models on cards"]) - 2 == len(choices)
    for model in document.leads:
        expected = sum(len(sets) for w, by_gpu in choices.items() if w.model == model for sets in by_gpu.values())
        measured = sum(len(document.evidence.estimated(w)) for w in choices if w.model == model)
        doubled = sum(len(by_gpu.get(None, {})) for w, by_gpu in choices.items() if w.model == model) - measured
        heading = next(name for name in found if name.replace("\\", "").split(" (")[0] == model)
        assert len(found[heading]) - 2 == expected - doubled


def test_the_figures_are_those_of_the_run_file(text: str, committed: list[ReadRun]) -> None:
    header, _, *rows = well_formed(text)["sdxl"]
    at = header.index("required GiB")
    shown = [row for row in rows if row[:3] == ["1024x1024", "1", "`fp16`"] and not row[at].startswith("\\~")]
    assert len(shown) == 1
    run = committed[int(shown[0][-1].split()[0].removeprefix("R")) - 1]
    memory = next(found for found in run.records if found.id == "sdxl/fp16/1024x1024/b1").memory
    assert shown[0][at] == f"{(memory.required_bytes or 0) / 2**30:.2f}"
    assert shown[0][header.index("nvidia-smi GiB")] == f"{(memory.nvml_process_peak_bytes or 0) / 2**30:.2f}"


def test_every_chart_that_the_document_shows_is_there(written: Report) -> None:
    text = (written.folder / "HARDWARE.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(shown) == len(set(shown)) > 0
    for name in shown:
        assert (written.folder / name).is_file()
        assert (written.folder / name).with_suffix(".png").is_file()
    assert len(list((written.folder / "charts").iterdir())) == 2 * len(shown)


# The same bytes


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_runs_give_the_same_bytes_wherever_the_report_is_made(written: Report, tmp_path: Path) -> None:
    folder = written.folder.parent / "second"
    code = (
        "import sys; from pathlib import Path; from pytest_vram.records.reading import read_runs; "
        "from pytest_vram.report.cards import read_cards; from pytest_vram.cases.models import read_models; "
        "from pytest_vram.report.render import Report; "
        "Report(read_runs([Path(p) for p in sys.argv[2:]])[0], read_cards(), read_models(), Path(sys.argv[1])).write()"
    )
    files = [str(run.path) for run in reversed(written.runs)]
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.facecolor: red\nsvg.hashsalt: x\n", encoding="utf-8")
    elsewhere = {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "7", "COLUMNS": "40"}
    mine = {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *files],
        env={**os.environ, **elsewhere, **mine},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = contents(written.folder), contents(folder)
    assert {Path(name).suffix for name in first} == {".md", ".html", ".svg", ".png", ".csv", ".parquet"}
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"^-o: .*file cannot be written: ") as caught:
        a_report(a_run(), folder=tmp_path / "file").write()
    assert "\n" not in str(caught.value)


# Made-up runs


def cells_of(report: Report, title: str, column: str) -> list[str]:
    header, _, *rows = well_formed(markdown(report))[title]
    return [row[header.index(column)] for row in rows]


def test_estimates_look_different_in_markdown() -> None:
    both = a_run(record(), estimate(case={"batch_size": 4}, id="4"))
    assert cells_of(a_report(both), "sdxl", "required GiB") == ["12.49", r"\~12.47"]
    for row in well_formed(markdown(a_report(both)))["Models on cards"][2:]:
        marked = [cell.startswith(r"\~") for cell in row[3:-1] if cell != "–"]
        assert set(marked) == {row[2] == "4"}
    assert "~" not in html_text(a_report(a_run(record())))


def html_text(report: Report) -> str:
    """What the tables of the page show."""
    tags = re.search(r'<section id="matrix".*?</section>', report.html(report.document(), ()), re.DOTALL)
    assert tags is not None
    return re.sub(r"<[^>]*>", " ", tags[0])


def test_estimates_look_different_in_html() -> None:
    guessed = html(a_report(a_run(estimate())))
    assert any("estimated" in value.split() for value in guessed.values("class"))
    measured = html(a_report(a_run(record())))
    assert not any("estimated" in value.split() for value in measured.values("class"))
    at = guessed.island["columns"].index("estimated")
    assert [row[at] for row in guessed.island["rows"]] == [1]
    assert [row[at] for row in measured.island["rows"]] == [0]


def test_a_run_with_only_estimates_says_that_nothing_was_measured(tmp_path: Path) -> None:
    report = a_report(a_run(estimate(), environment={"torch": "2.11.0"}), folder=tmp_path)
    report.write()
    text = (tmp_path / "HARDWARE.md").read_text(encoding="utf-8")
    assert "Measured on" not in text
    assert "nothing here was measured" in text
    assert "None" not in text
    assert all(cell.startswith(r"\~") for cell in cells_of(report, "sdxl", "required GiB"))
    assert all(name in contents(tmp_path) for name in ("charts/models-on-cards.svg", "records.csv"))


def test_somebody_s_own_pipeline_has_its_rows() -> None:
    report = a_report(a_run(own()))
    assert isinstance(report.runs[0].records[0].case, OwnCase)
    found = well_formed(markdown(report))
    row = found["Models on cards"][2]
    assert (row[0], row[1]) == (r"tests/test\_app.py", r"test\_painter")
    assert cells_of(report, r"tests/test\_app.py::test\_painter", "required GiB") == ["12.49"]
    assert [row[:2] for row in html(report).island["rows"]] == [["tests/test_app.py", "test_painter"]]


def test_what_costs_and_buys_nothing_is_told() -> None:
    more = record(id="more", case={"optimizations": ["fp16", "fused_qkv"]}, memory=needing(11_000))
    time = {"median_s": 900.0, "full_length_s": 900.0, "workers": [{"rounds_s": [900.0], "median_s": 900.0}]}
    slower = record(id="slower", case={"optimizations": ["fp16", "tf32"]}, memory=needing(9_000), time=time)
    saves = record(id="saves", case={"optimizations": ["fp16", "vae_tiling"]}, memory=needing(6_000))
    report = a_report(a_run(record(memory=needing(9_000)), more, slower, saves))
    assert cells_of(report, "What made it worse", "optimizations") == ["`fp16+fused_qkv`", "`fp16+tf32`"]
    assert cells_of(report, "What made it worse", "required GiB") == ["+1.95", "0"]
    assert cells_of(report, "What made it worse", "than") == ["`fp16`", "`fp16`"]
    assert "What made it worse" in html(report).texts["all"]
    assert "What made it worse" not in tables(markdown(a_report(a_run(record(memory=needing(9_000)), saves))))


def test_what_a_flag_costs_another_is_told() -> None:
    time = {"median_s": 900.0, "full_length_s": 900.0, "workers": [{"rounds_s": [900.0], "median_s": 900.0}]}
    saves = record(id="saves", case={"optimizations": ["fp16", "vae_tiling"]}, memory=needing(6_000))
    slower = record(id="both", case={"optimizations": ["fp16", "vae_tiling", "tf32"]}, memory=needing(6_000), time=time)
    report = a_report(a_run(record(memory=needing(9_000)), saves, slower))
    assert cells_of(report, "What made it worse", "optimizations") == ["`fp16+vae_tiling+tf32`"]
    assert cells_of(report, "What made it worse", "than") == ["`fp16+vae_tiling`"]
    assert cells_of(report, "What made it worse", "required GiB") == ["0"]


def test_a_set_for_two_gpus_says_what_each_must_have_and_is_recommended_for_no_card() -> None:
    gpus = [{"required_bytes": required * MIB} for required in (3_000, 2_000)]
    two = record(id="two", case={"optimizations": ["fp16", "device_map_balanced"]}, memory=needing(2_314), gpus=gpus)
    report = a_report(a_run(record(memory=needing(9_000)), two))
    [cell, _] = sorted(cells_of(report, "sdxl", "optimizations"), key=len, reverse=True)
    assert cell == "`fp16+device_map_balanced` (2 GPUs: 2.93 + 1.95)"
    assert "device_map_balanced" not in json.dumps(tables(markdown(report))["Models on cards"])
    alone = tables(markdown(a_report(a_run(two))))["Models on cards"]
    assert set(alone[2][3:-1]) <= {"no", "–"}
    assert "What made it worse" not in tables(markdown(report))
    gpus = [{"required_bytes": 11_686 * MIB}] * 2
    two = record(id="two", case={"optimizations": ["fp16", "context_parallel_ring"]}, memory=needing(11_000), gpus=gpus)
    report = a_report(a_run(record(memory=needing(9_000)), two))
    assert cells_of(report, "What made it worse", "optimizations") == ["`fp16+context_parallel_ring` (each of 2 GPUs)"]


def needing(mib: int) -> dict[str, Any]:
    figures = {"weights_bytes": 2_000 * MIB, "allocated_peak_bytes": mib * MIB, "reserved_peak_bytes": mib * MIB}
    needed = {"need_bytes": mib * MIB, "context_bytes": 686 * MIB, "required_bytes": (mib + 686) * MIB}
    return {**figures, **needed, "nvml_process_peak_bytes": None}


def test_an_oom_without_a_limit_requires_more_than_the_gpu_has() -> None:
    oom = record(status="oom", failure=FAILURE, time={}, memory=BARE)
    report = a_report(a_run(oom))
    assert cells_of(report, "sdxl", "required GiB") == ["&gt; 79.18"]
    row = well_formed(markdown(report))["Models on cards"][2]
    assert set(row[3:-1]) <= {"no", "–", "?"}
    island = html(report).island
    [shown] = [dict(zip(island["columns"], row, strict=True)) for row in island["rows"]]
    assert (shown["required"], shown["remark"]) == (79.18, "out of memory")


def test_an_oom_that_was_measured_is_not_marked_as_an_estimate() -> None:
    report = a_report(a_run(record(status="oom", failure=FAILURE, time={}, memory=BARE)))
    row = well_formed(markdown(report))["Models on cards"][2]
    assert set(row[3:-1]) <= {"no", "–", "?"}


def test_no_less_is_shown_as_required_than_what_a_case_ran_out_of() -> None:
    guess = {**BARE, "estimated_need_bytes": 70000 * MIB}
    report = a_report(a_run(record(status="oom", failure=FAILURE, time={}, memory=guess)))
    [cell] = cells_of(report, "sdxl", "required GiB")
    assert float(re.sub("[^0-9.]", "", cell)) >= 79.18


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (record(status="error", failure={"message": "CUDA broke"}, time={}, memory=BARE), "CUDA broke"),
        (record(status="timeout", failure={"message": "600 s"}, time={}, memory=BARE), "600 s"),
        (record(status="skipped", reason="bf16 is not for it", time={}, memory=BARE), "bf16 is not for it"),
        (record(memory=BARE), "no need was searched"),
        (record(memory=BARE, unavailable={"memory.need_bytes": "a probe hung"}), "a probe hung"),
    ],
)
def test_a_case_without_figures_is_told(found: Record, why: str) -> None:
    report = a_report(a_run(found, record(case={"batch_size": 4}, id="four")))
    assert cells_of(report, "Cases without figures", "why") == [why]
    assert cells_of(report, "Cases without figures", "status") == [found.status]
    assert len(cells_of(report, "sdxl", "required GiB")) == 1
    assert why in html(report).texts["all"]


def test_a_case_that_has_figures_elsewhere_is_not_among_those_without() -> None:
    failed = a_run(record(status="error", failure=FAILURE, time={}, memory=BARE), path="old.json")
    assert "Cases without figures" not in tables(markdown(a_report(failed, a_run(record()))))


def test_nothing_but_failures_still_makes_a_document(tmp_path: Path) -> None:
    failed = record(status="error", failure=FAILURE, time={}, memory=BARE)
    report = a_report(a_run(failed), folder=tmp_path)
    report.write()
    found = tables((tmp_path / "HARDWARE.md").read_text(encoding="utf-8"))
    assert [row[0] for row in found["Cases without figures"][2:]] == ["`sdxl/fp16/1024x1024/b1`"]


def test_no_record_at_all_still_makes_a_document(tmp_path: Path) -> None:
    a_report(a_run(), folder=tmp_path).write()
    assert len(tables((tmp_path / "HARDWARE.md").read_text(encoding="utf-8"))["Runs"]) == 3
    assert not list((tmp_path / "charts").iterdir())


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"unified_memory": False}, ""),
        ({"unified_memory": True}, "GPU and host share one memory"),
        ({"spills": "WSL"}, "Windows may move GPU memory to the host"),
    ],
)
def test_a_machine_whose_memory_means_something_else_is_remarked(facts: dict[str, Any], said: str) -> None:
    report = a_report(a_run(record(), environment={**H100, **facts}), a_run(record(), path="other.json"))
    text = markdown(report)
    assert [row[-1] for row in tables(text)["Runs"][2:]] == [said, ""]
    assert (f"**{said}**: " in text) is bool(said)  # how to read it


def test_refused_records_are_named_with_their_run() -> None:
    report = a_report(a_run(record(), refused=("sdxl/fp16/1024x1024/b4: need_bytes is above",)))
    assert re.search(r"^- R1: sdxl/fp16/1024x1024/b4: need", markdown(report), re.MULTILINE)
    assert "R1: sdxl/fp16/1024x1024/b4: need_bytes is above" in html(report).texts["all"]


@pytest.mark.parametrize(
    ("status", "limit", "agree"),
    [("ok", 13000, True), ("oom", 12000, True), ("oom", 13000, False), ("ok", 12000, False)],
)
def test_a_limit_checks_the_verdict(status: str, limit: int, agree: bool) -> None:
    limited = record(status=status, failure=FAILURE, case={"limit_bytes": limit * MIB}, id="limited")
    report = a_report(a_run(record(), limited))
    header, _, row = well_formed(markdown(report))["Verdicts that were checked"]
    said = dict(zip(header, row, strict=True))
    assert said["agree"].lower() == ("yes" if agree else "no")
    assert (said["expected"] == said["found"]) is agree
    assert len(cells_of(report, "sdxl", "required GiB")) == 1, "a check says no need"


def test_a_limit_checks_what_another_gpu_or_an_estimate_says() -> None:
    limited = a_run(record(case={"limit_bytes": 13000 * MIB}, id="limited"), environment={"gpu": "NVIDIA H200"})
    for known, said in ((a_run(record()), ""), (a_run(estimate(), environment={"torch": "2.11.0"}), r"\~")):
        header, _, row = tables(markdown(a_report(known, limited)))["Verdicts that were checked"]
        found = dict(zip(header, row, strict=True))
        assert found["required GiB"].startswith(said + "12."), found
        assert found["agree"] == "yes"


# Names that mean harm

HOSTILE = {
    "a tag": "<script>alert(1)</script>",
    "the end of a script": "</script><img src=x onerror=alert(1)>",
    "a comment": "<!-- --> --!>",
    "an attribute": '" onload="alert(1)" x=\'',
    "an entity": "&lt;b&gt; &amp;",
    "pipes": "a|b\\|c\\\\|",
    "lines": "a\nb\r\n# c\n| d | e |",
    "a code span": "`a``b`",
    "mathematics": "$x$ $\\frac{a}{b$",
    "an image": "![](http://a/b)",
    "a link": "[a](javascript:alert(1)) <http://a>",
    "a template": "{{ 7 * 7 }}{% raw %}",
    "escapes": "\x1b[31mred\x1b[0m\x07\x00\x9b",
    "right to left": "a\u202eb\u2066c",
    "emoji": "😀\U000e0041",
    "long": "x" * 200,
}


def hostile_run(text: str, path: str = "run.json") -> ReadRun:
    """A run with this text wherever a file may hold text."""
    case = {"model": text, "optimizations": ["fp16"]}
    phases = {name: {"time_s": 0.5, "allocated_peak_bytes": 9000 * MIB} for name in ("load", "denoise", "decode")}
    guess = {"estimated_need_bytes": 13000 * MIB}
    failure = {**FAILURE, "message": text}
    slower = {"median_s": 4.0, "at_need_s": 9.0, "workers": [{"rounds_s": [4.0], "median_s": 4.0}]}
    less = {"need_bytes": 9000 * MIB, "required_bytes": 9686 * MIB}
    effects: Any = {text: "no_effect"}
    limited = {**case, "limit_bytes": 13000 * MIB}
    one = {"model": text + ".py", "test": text, "build": text, "call": text}
    records = [
        record(id=text + "1", case=case, phases=phases, memory=guess),
        record(id=text + "2", case={**case, "batch_size": 4}, phases=phases, memory=guess, effects=effects),
        record(id=text + "3", case={**case, "width": 512}, phases=phases, memory=guess),
        record(id=text + "4", case={**case, "optimizations": ["fp16", text]}, time=slower, memory=less),
        record(id=text + "5", case={**case, "batch_size": 8}, status="error", failure=failure, time={}, memory=BARE),
        record(id=text + "6", case={**case, "batch_size": 9}, status="oom", failure=failure, time={}, memory=BARE),
        record(id=text + "7", case=limited),
        estimate(id=text + "8", case={**case, "batch_size": 16}),
        Record.model_validate({**facts(id=text + "9"), "case": one}),
    ]
    environment = {**H100, **dict.fromkeys(("gpu", "driver", "torch", "diffusers", "commit", "host"), text)}
    aliases = {text: [text, "also"]}
    refused = (f"{text}: {text}",)
    return a_run(*records, path=path, refused=refused, environment=environment, aliases=aliases, sweep=text)


@cache
def plain_markdown() -> str:
    return markdown(a_report(hostile_run("plain")))


@cache
def plain_html() -> Page:
    return html(a_report(hostile_run("plain")))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names_stay_text_in_markdown(kind: str) -> None:
    plain, hostile = plain_markdown(), markdown(a_report(hostile_run(HOSTILE[kind])))
    assert [len(rows) for rows in well_formed(hostile).values()] == [len(rows) for rows in well_formed(plain).values()]
    assert len(hostile.splitlines()) == len(plain.splitlines())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", hostile)
    comment, body = hostile.split("\n", 1)
    assert re.fullmatch(r"<!-- .* -->", comment)
    outside = re.sub(r"`[^`\n]*`", "", body)
    assert not re.search(r"(?<!\\)[<$]|(?<!\\)\]\(", outside), "no tag, no formula, no link"
    assert "&lt;" in hostile or "<" not in HOSTILE[kind]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names_stay_text_in_html(kind: str) -> None:
    plain, hostile = plain_html(), html(a_report(hostile_run(HOSTILE[kind])))
    assert hostile.shape == plain.shape
    assert hostile.open == plain.open
    assert len(hostile.texts["script"]) == 2
    assert hostile.texts["script"][1] == plain.texts["script"][1]
    at = hostile.island["columns"].index("model")
    text = HOSTILE[kind]
    assert {row[at] for row in hostile.island["rows"]} == {printable(f"{text} ({text}, also)"), printable(f"{text}.py")}
    assert hostile.island["cards"] == plain.island["cards"]


DRAWN = ("a comment", "right to left", "emoji", "long")


@pytest.mark.parametrize("kinds", [("escapes",), DRAWN], ids=["escapes", "others"])
def test_hostile_names_draw_with_no_warning_and_well_formed(kinds: tuple[str, ...]) -> None:
    runs = [hostile_run(HOSTILE[kind], f"{kind}.json") for kind in kinds]
    charts = svgs(a_report(*runs))
    assert len(charts) == len(CHARTS)
    for chart in charts:
        ElementTree.fromstring(chart)


# The page needs no other file


def addresses(page: Page) -> Iterator[str]:
    """Everything that a browser would load or go to."""
    for name in ("src", "href", "srcset", "action", "formaction", "poster", "data", "background", "xlink:href"):
        yield from page.values(name)


def test_the_page_loads_nothing(page: Page) -> None:
    found = list(addresses(page))
    assert all(address.startswith(("#", "data:")) for address in found)
    assert {"http-equiv", "src", "href"} <= {name for _, attributes in page.tags for name in attributes}
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base"}
    [style] = page.texts["style"]
    assert not re.search(r"url\(|@import", style)
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\(|\beval\b|innerHTML", page.texts["script"][1])


def test_the_pictures_in_the_page_load_nothing(written: Report) -> None:
    pictures = Page((written.folder / "hardware.html").read_text(encoding="utf-8")).values("src")
    assert len(pictures) == len(list((written.folder / "charts").glob("*.svg"))) > 0
    for picture in pictures:
        kind, _, data = picture.partition(";base64,")
        assert kind == "data:image/svg+xml"
        image = base64.b64decode(data, validate=True)
        for element in ElementTree.fromstring(image).iter():
            assert not element.tag.endswith(("}script", "}image", "}foreignObject"))
            for name, value in element.attrib.items():
                assert not name.startswith("on")
                assert not name.endswith("href") or value.startswith("#")
                assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", value))


def test_the_content_security_policy_allows_this_style_and_script_alone(page: Page) -> None:
    [policy] = [dict(a)["content"] or "" for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules["style-src"] == hashed(page.texts["style"][0])
    assert rules["script-src"] == hashed(page.texts["script"][1])
    assert "unsafe" not in policy
    assert len(page.texts["script"]) == 2, "the data, and what reads it"


def hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_no_handler_and_no_style_stands_in_a_tag(page: Page) -> None:
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert "style" not in names


def test_the_links_within_the_page_lead_somewhere(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {address.removeprefix("#") for address in page.values("href")} <= set(ids)
    at = page.island["columns"].index("runs")
    assert {tag for row in page.island["rows"] for tag in row[at].split()} <= set(ids)


def test_a_hostile_flag_s_name_stays_text() -> None:
    flag = "a\u202eb|<i>"
    found = record(case={"optimizations": ["fp16", flag]}, effects={flag: "no_effect"})
    report = a_report(a_run(found))
    for text in (report.html(report.document(), ()), markdown(report)):
        assert "\u202e" not in text
        assert "<i>" not in text


def test_half_a_character_in_a_flag_s_name_costs_its_record_alone(tmp_path: Path) -> None:
    document = {"schema": 1, "environment": {}, "sweep": "x"}
    records = [facts(effects={"\ud800": "no_effect"}), facts(id="neighbour")]
    (tmp_path / "run.json").write_text(json.dumps({"vram": {**document, "records": records}}), encoding="utf-8")
    [run], notes = read_runs([tmp_path])
    assert [kept.id for kept in run.records] == ["neighbour"]
    assert "records.0.effects" in notes[0]
    assert a_report(run, folder=tmp_path).write()

"""From the evidence to files: HARDWARE.md, hardware.html, the charts and the table of all records."""

import base64
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_vram.cases.models import Model
from pytest_vram.errors import UsageError, printable
from pytest_vram.records.reading import ReadRun
from pytest_vram.report.cards import Card
from pytest_vram.report.choices import SAME_GPU_TIME, SAME_TIME, SAME_TIME_OF_ONE, SIMULATED_SHARE
from pytest_vram.report.document import METHOD, Document, Table
from pytest_vram.report.evidence import gather
from pytest_vram.report.explorer import explorer
from pytest_vram.report.text import code, markdown

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Environment
    from markupsafe import Markup

    from pytest_vram.report.charts import Chart

TEMPLATES = Path(__file__).parent / "templates"
HEADS = (  # of the explorer's columns: key, heading, class
    ("model", "model", "first"),
    ("size", "size", ""),
    ("batch", "batch", "n"),
    ("verdict", "verdict", "verdict"),
    ("required", "required GiB", "n"),
    ("set", "optimizations", "set"),
    ("seconds", "s", "n"),
    ("saved", "saved", "n more"),
    ("paid", "paid", "n more"),
    ("frontier", "frontier", "more"),
    ("shown", "nvidia-smi GiB", "n more"),
    ("slowdown", "at need", "n more"),
    ("host", "host GiB", "n more"),
    ("disk", "disk GiB", "n more"),
)


class Raw(str):
    """Markdown that is written as it is; everything else that a template prints is escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Report:
    """Run files, cards and models, and the folder that the documents are written to."""

    runs: Sequence[ReadRun]
    cards: Sequence[Card]
    models: dict[str, Model]
    folder: Path
    header: str = "pytest-vram report"

    def write(self) -> list[Path]:
        """Write every document, and give their paths.

        Raises:
            UsageError: where the folder cannot be written.
        """
        from pytest_vram.report.charts import Facts, draw
        from pytest_vram.report.frame import frame

        document = self.document()
        charts = draw(Facts(document.evidence, document.leads, self.cards))
        table = frame(self.runs)
        try:
            (self.folder / "charts").mkdir(parents=True, exist_ok=True)
            written = [
                _write(self.folder / "HARDWARE.md", self.markdown(document, charts).encode()),
                _write(self.folder / "hardware.html", self.html(document, charts).encode()),
            ]
            for chart in charts:
                written.append(_write(self.folder / "charts" / f"{chart.name}.svg", chart.svg))
                written.append(_write(self.folder / "charts" / f"{chart.name}.png", chart.png))
            written.append(_write(self.folder / "records.csv", for_spreadsheets(table).to_csv(index=False).encode()))
            parquet = io.BytesIO()
            table.to_parquet(parquet, index=False)
            written.append(_write(self.folder / "records.parquet", parquet.getvalue()))
        except OSError as error:
            raise UsageError(f"-o: {self.folder} cannot be written: {error.strerror or error}") from error
        return written

    def document(self) -> Document:
        """What the documents say."""
        return Document(gather(self.runs), self.cards, self.models, self.folder)

    def markdown(self, document: Document, charts: "Sequence[Chart]") -> str:
        """HARDWARE.md."""
        environment = _environment(
            lstrip_blocks=True,
            autoescape=False,  # finalize escapes for Markdown
            finalize=lambda value: value if isinstance(value, Raw) else markdown(str(value)),
        )
        filters: dict[str, Callable[..., Raw]] = {
            "code": lambda text: Raw(code(text)),
            "table": table_lines,
            "comment": _comment,
        }
        environment.filters |= filters
        own = {"requirements": document.all_requirements(), "matrix": document.matrix()}
        return environment.get_template("hardware.md.j2").render(self._values(document, charts) | own)

    def tables(self, document: Document) -> dict[str, Table]:
        """The tables of HARDWARE.md by their headings, as far as they can have rows."""
        whole = (
            document.runs(),
            document.matrix(),
            document.worse(),
            document.largest(),
            document.checks(),
            document.failed(),
        )
        found = {f"## {markdown(table.title)}": table for table in whole}
        return found | {f"### {markdown(table.title)}": table for table in document.all_requirements()}

    def html(self, document: Document, charts: "Sequence[Chart]") -> str:
        """hardware.html, which needs no other file."""
        from markupsafe import Markup

        environment = _environment(autoescape=True, finalize=_visible)
        environment.filters["breakable"] = _breakable
        style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("hardware.css", "hardware.js"))
        pictures = [{**vars(chart), "base64": base64.b64encode(chart.svg).decode("ascii")} for chart in charts]
        own = {
            "style": Markup(style),
            "script": Markup(script),
            "style_hash": Markup(_hash(style)),
            "script_hash": Markup(_hash(script)),
            "charts": pictures,
            "matrix": document.matrix(document.leads.values()),
            "explorer": explorer(document),
            "explorer_heads": HEADS,
        }
        return environment.get_template("hardware.html.j2").render(self._values(document, charts) | own)

    def _values(self, document: Document, charts: "Sequence[Chart]") -> dict[str, Any]:
        return {
            "header": self.header,
            "gpus": document.gpus,
            "estimates": document.estimates,
            "answers": document.answers,
            "largest": document.largest(),
            "worse": document.worse(),
            "charts": charts,
            "checks": document.checks(),
            "accuracy": document.accuracy(),
            "failed": document.failed(),
            "refused": [f"{document.tags[run.path]}: {line}" for run in self.runs for line in run.refused],
            "method": {**METHOD, **document.caveats},
            "same_time": f"{SAME_TIME:g}",
            "simulated_more": f"{SIMULATED_SHARE * 100:.0f}",
            "same_time_of_one": f"{SAME_TIME_OF_ONE:.1f}",
            "same_gpu_time": f"{SAME_GPU_TIME:g}",
            "elsewhere_mib": document.elsewhere_mib,
            "runs": document.runs(),
        }


def for_spreadsheets(table: "pd.DataFrame") -> "pd.DataFrame":
    """The table with text that no terminal takes for more, and a quote before what a spreadsheet would take for a
    formula."""
    quoted = table.copy()
    for column in map(str, table.select_dtypes("string").columns):
        text = table[column].map(printable, na_action="ignore").astype("string")
        quoted[column] = text.str.replace(r"^([=+\-@])", r"'\1", regex=True)
    return quoted


def table_lines(table: Table) -> Raw:
    """A table in Markdown."""
    lines = [_line(map(markdown, table.columns)), _line("---" for _ in table.columns)]
    for row in table.rows:
        parts = ((markdown(cell.text), code(cell.name) if cell.name else "", markdown(cell.remark)) for cell in row)
        lines.append(_line(" ".join(filter(None, part)) for part in parts))
    return Raw("\n".join(lines))


def _visible(value: Any) -> Any:
    """Text without the controls that would change how what follows it is shown."""
    return printable(value) if type(value) is str else value


def _breakable(text: str) -> "Markup":
    """A set of optimizations in HTML, which may go to the next line after + and _."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([+_])", r"\1<wbr>", str(escape(printable(text)))))


def _comment(text: str) -> Raw:
    """JSON as it may stand in a comment of HTML."""
    return Raw(text.replace(">", "\\u003e"))


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _environment(**settings: Any) -> "Environment":
    """Jinja's for our templates; a name that a template misspells is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        **settings,
    )


def _hash(text: str) -> str:
    """The text as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _write(path: Path, content: bytes) -> Path:
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path

"""The command pytest-vram."""

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from packaging.requirements import Requirement
from rich import box
from rich.console import Console
from rich.table import Table

from pytest_vram.errors import UsageError, VramError, printable, unknown

if TYPE_CHECKING:
    from pytest_vram.cases.models import Model
    from pytest_vram.compare.comparison import Comparison
    from pytest_vram.pipelines.optimizations.base import Optimization
    from pytest_vram.report.render import Report

app = typer.Typer(add_completion=False, no_args_is_help=True, help="What diffusion models cost on a GPU.")
CARDS_HELP = "A file of your own cards, in the form of the packaged cards.toml."
Form = Literal["table", "markdown", "json"]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]


def _show(columns: list[str], rows: list[list[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("\n".join(map(printable, cell.split("\n"))).replace("[", r"\[") for cell in row))
    width = None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns)
    Console(highlight=False, width=width).print(table)


@app.command()
def init(
    build: Annotated[str | None, typer.Option(help="Makes your own pipeline: module:function.")] = None,
    call: Annotated[str | None, typer.Option(help="Calls it once: module:function.")] = None,
) -> None:
    """Set up this folder's repository: bench/ and conftest.py. Nothing that is there is overwritten."""
    from pytest_vram.starting import initialize

    rows = [[written.path, written.done, written.left] for written in initialize(Path.cwd(), build, call)]
    _show(["file", "", "left to do"], rows)
    typer.echo("pytest bench --gpu measures; without a GPU, pytest bench estimates.")
    if build is None:
        typer.echo("A pipeline of your own: pytest-vram init --build module:function --call module:function")


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, what is missing and what mends it. Exits 1 where --gpu could not work."""
    from pytest_vram.measure.doctor import examine

    findings = list(examine(Path("results")))
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        _show(["", "looked at", "found", "what helps"], [[f.verdict, f.name, f.found, f.mend] for f in findings])
    if any(finding.verdict == "missing" for finding in findings):
        if not as_json:
            typer.echo("--gpu cannot work here; the estimate, pytest bench, needs no GPU.")
        raise typer.Exit(1)
    if not as_json:
        typer.echo("--gpu can work here.")


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="Show the architecture of this model.")] = None,
    as_json: Json = False,
) -> None:
    """The models that come with the package, and those in bench/models; with a name, one architecture."""
    from pytest_vram.cases.models import find_model, read_models

    found = read_models(Path("bench") / "models")
    if name is not None:
        try:
            model = find_model(name, found)
        except ValueError as error:
            raise UsageError(str(error)) from error
        typer.echo(json.dumps(_as_json(model), indent=1) if as_json else _architecture(model))
    elif as_json:
        typer.echo(json.dumps([_as_json(model) for model in found.values()], indent=1))
    else:
        rows = [
            [
                model.name,
                model.kind,
                f"{(model.components[model.denoiser].parameters or 0) / 1e9:.2f}",
                f"{model.parameters / 1e9:.2f}",
                f"{model.disk_bytes / 1e9:.1f}",
                _native(model),
                str(model.native.steps),
                f"{model.licence or '?'}{', gated' if model.gated else ''}",
            ]
            for model in found.values()
        ]
        _show(["model", "makes", "denoiser", "all", "GB", "native", "steps", "licence"], rows)
        typer.echo(
            "denoiser, all: billions of parameters. GB: the weights in half precision. gated: the hub asks to agree."
        )
        typer.echo("`pytest-vram models NAME` shows one; --vram-models takes also owner/name of the hub, or ./folder.")


def _native(model: "Model") -> str:
    native = model.native
    return f"{native.width}x{native.height}{f' f{native.frames}' if native.frames else ''}"


def _as_json(model: "Model") -> dict[str, Any]:
    facts = {"kind": model.kind, "parameters": model.parameters, "disk_bytes": model.disk_bytes}
    return model.model_dump(mode="json", by_alias=True) | facts


def _architecture(model: "Model") -> str:
    """One architecture as text: what it is, then each network with what differs from its class's defaults."""
    native = model.native
    facts = {
        "also": ", ".join(model.aliases),
        "hub": f"{model.hub_id}{' (gated)' if model.gated else ''}",
        "licence": model.licence or "not known",
        "pipeline": model.pipeline,
        "native": f"{_native(model)}, {native.steps} steps, guidance {native.guidance_scale:g}, "
        f"{native.sequence_length} tokens",
        "takes": f"multiples of {model.resolution_multiple} pixels"
        + (f", {model.frame_multiple}n + 1 frames" if model.kind == "video" else ""),
        "weights": f"{model.disk_bytes / 1e9:.1f} GB in half precision",
        "scheduler": model.scheduler.class_name,
    }
    lines = [f"{model.name}: {model.kind}, {model.parameters / 1e9:.2f} B parameters"]
    lines += [f"  {key:10}{value}" for key, value in facts.items() if value]
    for name, component in model.components.items():
        role = " (denoiser)" if name == model.denoiser else " (decoder)" if name == model.decoder else ""
        count = f"{component.parameters / 1e9:.3f} B" if component.parameters else "parameters not known"
        lines += ["", f"{name}{role}: {component.class_name} of {component.library}, {count}"]
        lines += [f"  {key} = {json.dumps(value)}" for key, value in component.config.items()]
    return "\n".join(map(_visible, lines))


def _visible(line: str) -> str:
    """The line, indented as it was, with what is more than text in it left out."""
    return line[: len(line) - len(line.lstrip(" "))] + printable(line)


@app.command()
def optimizations(
    name: Annotated[str | None, typer.Argument(help="Show this one.")] = None, as_json: Json = False
) -> None:
    """The optimizations, in the order in which an id names them; with a name, one of them."""
    from pytest_vram.pipelines.optimizations import OPTIMIZATIONS

    if name is not None and name not in OPTIMIZATIONS:
        raise UsageError(unknown("optimization", name, OPTIMIZATIONS))
    rows = [_optimization(one) for one in OPTIMIZATIONS.values() if name in (None, one.name)]
    if as_json:
        typer.echo(json.dumps(rows[0] if name else rows, indent=1))
    elif name is not None:
        facts = rows[0] | {
            "excludes": ", ".join(_excludes(OPTIMIZATIONS[name])),
            "versions": " ".join(rows[0]["versions"]),
        }
        for key, value in facts.items():
            said = ("no", "yes")[value] if isinstance(value, bool) else value
            typer.echo(f"{key.replace('_', ' '):23}{said}".rstrip())
    else:
        lists = [
            [one.name, one.summary, "yes" if one.exact else "", ", ".join(_excludes(one))]
            for one in OPTIMIZATIONS.values()
        ]
        _show(["name", "what it does", "exact", "excludes"], lists)
        typer.echo("exact: it should leave the image as it is; what every flag does to it is measured.")
        typer.echo("`pytest-vram optimizations NAME` shows one, with the call that it stands for and what it needs.")


def _optimization(one: "Optimization") -> dict[str, Any]:
    from pytest_vram.pipelines.optimizations import excluded

    return {
        "name": one.name,
        "summary": one.summary,
        "call": one.call,
        "exact": one.exact,
        "excludes": list(excluded(one.name)),
        "needs_gpu": one.needs_gpu,
        "gpus": one.gpus,
        "needs_trained_weights": one.trained,
        "package": one.package,
        "versions": _versions("diffusers", one.package),
    }


def _versions(*packages: str) -> list[str]:
    """What of these this package asks for, as pip writes it."""
    specs: dict[str, str] = {}
    for text in metadata.requires("pytest-vram") or ():
        asked = Requirement(text)
        specs.setdefault(asked.name, f"{asked.name}{asked.specifier}")
    return [specs.get(name, name) for name in packages if name]


def _excludes(one: "Optimization") -> list[str]:
    """What it excludes, by kind where a flag excludes all of one."""
    from pytest_vram.pipelines.optimizations import OPTIMIZATIONS, excluded

    others = {name: OPTIMIZATIONS[name].one_of for name in excluded(one.name)}
    left = {other.one_of for name, other in OPTIMIZATIONS.items() if name not in others and name != one.name}
    kinds = {name: kind for name, kind in others.items() if kind is None or kind != one.one_of}
    said = [name if kind is None or kind in left else kind for name, kind in kinds.items()]
    return list(dict.fromkeys([*([f"other {one.one_of}"] if one.one_of else []), *said]))


@app.command()
def cards(
    more: Annotated[list[Path] | None, typer.Option("--cards", metavar="FILE", help=CARDS_HELP)] = None,
    as_json: Json = False,
) -> None:
    """The GPUs that verdicts are given for, least memory first. GiB, GB/s, TFLOP/s (dense)."""
    from pytest_vram.report.cards import PACKAGED, read_cards
    from pytest_vram.report.text import gib

    found = read_cards(*(more or []))
    if as_json:
        typer.echo(json.dumps([card.model_dump() | {"usable_bytes": card.usable_bytes} for card in found], indent=1))
        return

    def figure(value: float | None) -> str:
        return "–" if value is None else f"{value:g}"

    columns = ["card", "kind", "box", "seen", "usable", "GB/s", "fp16", "bf16", "fp8", "CUDA"]
    rows = [
        [
            printable(card.name),
            card.kind,
            figure(card.memory_gib),
            figure(card.visible_gib),
            gib(card.usable_bytes),
            *map(figure, (card.bandwidth_gb_s, card.fp16_tflops, card.bf16_tflops, card.fp8_tflops)),
            card.compute_capability or "none",
        ]
        for card in found
    ]
    _show(columns, rows)
    typer.echo("seen: by PyTorch. usable: seen, less what a desktop holds. CUDA: compute capability; without, only")
    typer.echo("the memory is judged. Add your own with --cards FILE, in the form of")
    typer.echo(str(PACKAGED))


@app.command()
def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run files, or folders of them.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", metavar="DIR", help="Where the documents go.")] = Path("results"),
    model: Annotated[str | None, typer.Option(help="The short answer for this model; nothing is written.")] = None,
    card: Annotated[str | None, typer.Option(help="The short answer for this card; nothing is written.")] = None,
    more: Annotated[list[Path] | None, typer.Option("--cards", metavar="FILE", help=CARDS_HELP)] = None,
    headless: Annotated[bool, typer.Option("--headless", help="No desktop holds memory of any card.")] = False,
) -> None:
    """Write the hardware-requirements document from run files: HARDWARE.md, hardware.html, charts, CSV and Parquet.

    With --model or --card it prints the short answer instead.
    """
    from pytest_vram.report.answer import answer, find_model
    from pytest_vram.report.cards import find_card
    from pytest_vram.report.checking import MadeFrom
    from pytest_vram.report.document import seen_from

    paths, own = runs or [Path("results")], more or []
    if model is None and card is None:
        made = MadeFrom(seen_from(out, paths), seen_from(out, own), headless)
        for path in _report(paths, own, out, headless, made.header()).write():
            typer.echo(path)
        return
    made_report = _report(paths, own, out, headless)
    document = made_report.document()
    found = find_model(model, document) if model is not None else None
    typer.echo(answer(document, found, find_card(card, made_report.cards) if card is not None else None))


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="A run file, a folder, a commit or `latest`; or a saved comparison.")],
    head: Annotated[str | None, typer.Argument(help="The same, for what may be worse.")] = None,
    form: Annotated[Form, typer.Option("--format", help="How it is written.")] = "table",
    across: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Compare although this differs, such as torch or steps.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Ambiguous fails too.")] = False,
    results: Annotated[Path, typer.Option(metavar="DIR", help="Where commits and `latest` are looked for.")] = Path(
        "results"
    ),
    matrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A matrix with thresholds; default: bench/matrix.toml.")
    ] = None,
) -> None:
    """What HEAD made worse than BASE, case by case. Exits 1 where something is worse, 2 where they are not comparable.

    With one argument a comparison that was saved is shown again.
    """
    from pytest_vram.compare.comparison import comparison_json, read_comparison
    from pytest_vram.compare.finding import is_file
    from pytest_vram.report.comparing import as_markdown, table

    if head is None:
        if not is_file(base):
            raise UsageError(f"{base}: is no saved comparison; to compare two runs give BASE and HEAD")
        found = read_comparison(Path(base))
        found = found.model_copy(update={"strict": found.strict or strict})
    else:
        found = _compare(base, head, across or [], strict, results, matrix)
    write = {"table": table, "markdown": as_markdown, "json": comparison_json}[form]
    typer.echo(write(found).rstrip("\n"))
    if found.failed:
        raise typer.Exit(1)


def _compare(base: str, head: str, across: list[str], strict: bool, results: Path, matrix: Path | None) -> "Comparison":
    from pytest_vram.cases.sweep import read_thresholds
    from pytest_vram.cases.thresholds import Limits, read_project
    from pytest_vram.compare.comparing import compare as compared
    from pytest_vram.compare.finding import Like, find_run
    from pytest_vram.compare.keys import known_key

    keys = [known_key(key.strip(), "--across") for text in across for key in text.split(",")]
    usual = Path("bench") / "matrix.toml"
    tables = [read_project(Path.cwd())]
    if matrix is not None or usual.is_file():
        tables.append(read_thresholds(matrix or usual))
    newer = find_run(head, results, Path.cwd())
    older = find_run(base, results, Path.cwd(), Like.run(newer, keys))
    return compared(older, newer, Limits(tables), across=keys, strict=strict)


@app.command()
def merge(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run files of one sweep, or folders of them.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The new run file; default: a new one in results/."),
    ] = None,
) -> None:
    """Make one run file of several: of the shards of a sweep (--vram-shard), or of GPUs of one kind."""
    from pytest_vram.records.files import folder_of, new_path, write_run
    from pytest_vram.records.merging import merge as merged
    from pytest_vram.records.reading import read_runs

    found, notes = read_runs(runs)
    made = merged(found)
    for note in notes:
        typer.echo(printable(note), err=True)
    environment, options = made.run.environment, made.run.options
    folder = Path("results") / folder_of(options.get("device"), environment.get("gpu"))
    path = output or new_path(folder, environment)
    try:
        if path.exists():
            raise UsageError(f"--output: {path} is there; nothing is overwritten: name another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_run(path, made.run)
    except OSError as error:
        raise UsageError(f"--output: {path} cannot be written: {error.strerror}") from error
    typer.echo(f"{len(made.run.records)} cases of {len(found)} runs; {made.dropped} duplicates dropped")
    if made.missing:
        typer.echo(f"not complete: no complete run of shard {', '.join(made.missing)}")
    elif not made.run.complete:
        typer.echo("not complete: a run of these is not")
    typer.echo(path)


@app.command()
def check(
    document: Annotated[Path, typer.Argument(help="A HARDWARE.md that `pytest-vram report` wrote.")],
    most: Annotated[int, typer.Option("--most", min=1, help="Name no more than this many.")] = 20,
) -> None:
    """Exit 1, and name the cells, where a document disagrees with the runs that it was made from."""
    from pytest_vram.records.files import read_text
    from pytest_vram.report.checking import differences, made_from

    text = read_text(document)
    made = made_from(text, document)
    runs, own = ([document.parent / name for name in names] for names in (made.runs, made.cards))
    report = _report(runs, own, document.parent, made.headless, made.header())
    fresh = report.document()
    found = list(differences(text, report.markdown(fresh, ()), report.tables(fresh)))
    for line in found[:most]:
        typer.echo(printable(line))
    if found:
        rest = f", {len(found) - most} of them not shown" if len(found) > most else ""
        typer.echo(f"{document}: {len(found)} places disagree with the runs{rest}; `pytest-vram report` makes it again")
        raise typer.Exit(1)
    typer.echo(f"{document}: agrees with {len(report.runs)} runs")


def _report(runs: list[Path], cards: list[Path], folder: Path, headless: bool, header: str = "") -> "Report":
    """What the runs say; notes of the reading go to standard error."""
    from pytest_vram.cases.models import read_models
    from pytest_vram.records.reading import read_runs
    from pytest_vram.report.cards import read_cards
    from pytest_vram.report.render import Report

    found, notes = read_runs(runs)
    for note in notes:
        typer.echo(printable(note), err=True)
    return Report(found, read_cards(*cards, headless=headless), read_models(), folder, header)


def main() -> None:
    """Run the command; an error of ours is one line and exit code 2."""
    try:
        app()
    except VramError as error:
        typer.echo(printable(f"pytest-vram: {error}"), err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()

"""The command pytest-vram."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from pytest_vram.errors import VramError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="What diffusion models cost on a GPU.")
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]


def _show(columns: list[str], rows: list[list[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console(highlight=False).print(table)


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
def models(as_json: Json = False) -> None:
    """The models that come with the package."""
    from pytest_vram.cases.models import read_models

    found = read_models().values()
    if as_json:
        typer.echo(json.dumps([model.model_dump(mode="json", by_alias=True) for model in found], indent=1))
        return
    rows: list[list[str]] = []
    for model in found:
        native = model.native
        parameters = sum(component.parameters or 0 for component in model.components.values())
        rows.append(
            [
                model.name,
                ", ".join(model.aliases),
                f"{parameters / 1e9:.2f} B",
                f"{native.width}x{native.height}",
                str(native.steps),
                f"{native.guidance_scale:g}",
                model.hub_id,
            ]
        )
    _show(["model", "also", "parameters", "native", "steps", "guidance", "hub id"], rows)


@app.command()
def optimizations(as_json: Json = False) -> None:
    """The optimizations, in the order in which an id names them."""
    from pytest_vram.pipelines.optimizations import OPTIMIZATIONS

    rows: list[dict[str, Any]] = [
        {"name": o.name, "summary": o.summary, "excludes": sorted(o.excludes), "needs_gpu": o.needs_gpu}
        for o in OPTIMIZATIONS.values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _show(["name", "what it does", "excludes"], [[r["name"], r["summary"], ", ".join(r["excludes"])] for r in rows])


def main() -> None:
    """Run the command; an error of ours is one line and exit code 2."""
    try:
        app()
    except VramError as error:
        typer.echo(f"pytest-vram: {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()

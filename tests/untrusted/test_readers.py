"""Every reader on files of strangers: it gives a value, or refuses in one line; there is no third way."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vram.cases.models import model_from_folder, read_model, read_models
from pytest_vram.cases.sweep import Matrix, Overrides, expand
from pytest_vram.cases.thresholds import read_project
from pytest_vram.cases.toml import read_toml
from pytest_vram.compare.comparing import compare
from pytest_vram.compare.comparison import comparison_json, read_comparison
from pytest_vram.compare.finding import find_run, read_one
from pytest_vram.errors import NotComparable, RunFileError, UsageError
from pytest_vram.pipelines.optimizations import parse_optimizations
from pytest_vram.records.files import folder_of, new_path, read_journal, read_run, read_text, slug
from pytest_vram.records.merging import merge
from pytest_vram.records.reading import read_runs
from pytest_vram.records.resuming import unfinished
from pytest_vram.report.cards import find_card, read_cards
from pytest_vram.report.checking import differences, made_from
from pytest_vram.report.comparing import as_markdown, table
from tests.compare.test_comparison import a_comparison
from tests.records.test_schema import FAILURE, facts, own
from tests.untrusted.strategies import (
    PLANTED,
    as_json,
    as_toml,
    assert_one_line,
    controls,
    mutated,
    odd,
    put,
    texts,
    value_or_refusal,
)

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "models" / "tiny-sd.toml"
CARDS = {"name": "Our Box", "aliases": ["box"], "kind": "desktop", "memory_gib": 20, "visible_gib": 19.5}
MATRIX = {
    "sweeps": {
        "quick": {
            "steps": 4,
            "blocks": {
                "one": {
                    "models": ["tiny-sd", "tiny"],
                    "optimizations": ["fp16", "fp16+vae_tiling"],
                    "resolutions": ["native", "64x32", 32],
                    "frames": ["native"],
                    "batch_sizes": [1, 4],
                    "exclude": [{"optimizations": ["fp16"], "batch_sizes": [4]}, {"resolutions": [32]}],
                }
            },
        }
    },
    "thresholds": {"allocated": {"relative": 0.1, "absolute": "16MiB"}, "only": [{"ids": ["*"], "models": ["sdxl"]}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strangers")


@pytest.fixture(autouse=True, scope="module")
def few_packaged_cards(folder: Path) -> Iterator[None]:
    """Else nearly all of the time goes into reading those of the package again."""
    few = put(folder / "packaged.toml", as_toml({"cards": [{**CARDS, "name": "RTX 3060"}]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytest_vram.report.cards.PACKAGED", few)
        yield


@cache
def run_files() -> list[Any]:
    """Small run files: real ones of results/, with few records, and one with a record of each kind."""
    found = []
    for path in sorted((ROOT / "results").glob("*/*.json"), key=lambda path: path.stat().st_size)[:6]:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["vram"]["records"] = document["vram"]["records"][:2]
        document["benchmarks"] = []
        found.append(document)
    kinds = [
        facts(),
        facts(id="oom", status="oom", failure=FAILURE, time={}),
        facts(id="skipped", status="skipped", reason="not here", time={}),
        own().model_dump(mode="json"),
    ]
    environment = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_memory_bytes": 81079 << 20, "commit": "1a2b3c4"}
    options = {"device": "cuda", "shard": "1/2", "cases": ["a", "b"], "deselected": ["b"], "overrides": {"steps": 4}}
    found.append(
        {"vram": {"schema": 1, "environment": environment, "sweep": "d", "options": options, "records": kinds}}
    )
    return found


def model_document() -> dict[str, Any]:
    import tomllib

    return tomllib.loads(TINY.read_text(encoding="utf-8"))


@cache
def comparisons() -> list[Any]:
    made = a_comparison("worse", "same", "new", "ambiguous")
    return [json.loads(comparison_json(made))]


def read_everything(path: Path) -> None:
    """All that a command does with one run file before it shows anything."""
    run = read_one(path)
    for environment in (run.run.environment,):
        assert new_path(path.parent, environment).parent == path.parent
        assert folder_of("cuda", environment.get("gpu")).strip("abcdefghijklmnopqrstuvwxyz0123456789-") == ""
    assert run.started is None or run.started.tzinfo is not None


@given(st.binary(max_size=400))
def test_a_run_file_of_any_bytes(folder: Path, content: bytes) -> None:
    value_or_refusal(lambda: read_run(put(folder / "any.json", content)), RunFileError)


@given(odd)
def test_a_run_file_of_any_json(folder: Path, document: Any) -> None:
    value_or_refusal(lambda: read_run(put(folder / "json.json", as_json(document))), RunFileError)
    value_or_refusal(lambda: read_run(put(folder / "json.json", as_json({"vram": document}))), RunFileError)


@given(mutated(run_files()))
def test_a_run_file_with_changes(folder: Path, document: Any) -> None:
    path = put(folder / "changed.json", as_json(document))
    value_or_refusal(lambda: read_run(path), RunFileError)
    value_or_refusal(lambda: read_everything(path), RunFileError)


@given(mutated(run_files()), st.lists(mutated(run_files()), max_size=2), st.binary(max_size=50))
def test_a_journal_with_changes(folder: Path, header: Any, others: list[Any], tail: bytes) -> None:
    vram = header.get("vram") if isinstance(header, dict) else header
    records = vram.pop("records", []) if isinstance(vram, dict) else []
    lines = [vram, *(records if isinstance(records, list) else [records]), *others]
    path = put(folder / "changed.jsonl", b"\n".join([*map(as_json, lines), tail]))
    value_or_refusal(lambda: read_journal(path), RunFileError)
    value_or_refusal(lambda: read_everything(path), RunFileError)


@given(mutated(run_files()), mutated(run_files()))
def test_several_runs(tmp_path_factory: pytest.TempPathFactory, one: Any, other: Any) -> None:
    here = tmp_path_factory.mktemp("several")
    paths = [put(here / f"{name}.json", as_json(document)) for name, document in (("a", one), ("b", other))]
    found = value_or_refusal(lambda: read_runs([here]), RunFileError)
    for name in ("latest", "1a2b3c4", str(paths[0])):
        value_or_refusal(lambda name=name: find_run(name, here, here), RunFileError)  # type: ignore[misc]
    assert all(path.suffix == ".json" for path, _ in unfinished(here))
    if found is None:
        return
    runs, notes = found
    assert not any("\n" in note for note in notes)
    value_or_refusal(lambda: merge(runs), UsageError, RunFileError)
    if len(runs) == 2:
        compared = value_or_refusal(lambda: compare(runs[0], runs[1], _limits()), NotComparable)
        if compared is not None:
            assert_shown(table(compared), as_markdown(compared))
            comparison_json(compared)


def _limits() -> Any:
    from pytest_vram.cases.thresholds import Limits

    return Limits()


def assert_shown(terminal: str, written: str) -> None:
    assert not controls(terminal, "\n")
    assert not controls(written, "\n\N{ZERO WIDTH SPACE}")
    assert "<script" not in written.lower()


@given(mutated(comparisons()))
def test_a_saved_comparison(folder: Path, document: Any) -> None:
    path = put(folder / "comparison.json", as_json(document))
    found = value_or_refusal(lambda: read_comparison(path), RunFileError)
    if found is not None:
        assert_shown(table(found), as_markdown(found))
        json.loads(comparison_json(found))


TOML_READERS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "matrix": (lambda path: _expanded(path), MATRIX),
    "model": (read_model, model_document()),
    "cards": (lambda path: [card.usable_bytes for card in read_cards(path)], {"cards": [CARDS]}),
    "thresholds": (
        lambda path: read_project(path.parent),
        {"tool": {"pytest-vram": {"thresholds": MATRIX["thresholds"]}, "other": {"x": 1}}},
    ),
}


@cache
def tiny_alone() -> Any:
    return {"tiny-sd": read_model(TINY)}


def _expanded(path: Path) -> list[str]:
    """The ids of all cases of all sweeps of a matrix."""
    ids = []
    for name, sweep in read_toml(path, Matrix).sweeps.items():
        cases = expand(sweep, f"{path}: sweeps.{name}", tiny_alone(), parse_optimizations, Overrides())
        ids += [case.id for case in cases]
    return ids


@pytest.mark.parametrize("kind", TOML_READERS)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))))
def test_a_toml_file_of_any_bytes(folder: Path, kind: str, content: bytes) -> None:
    value_or_refusal(lambda: TOML_READERS[kind][0](put(folder / "pyproject.toml", content)), UsageError)


@given(data=st.data())
@pytest.mark.parametrize("kind", TOML_READERS)
def test_a_toml_file_with_changes(folder: Path, kind: str, data: st.DataObject) -> None:
    read, document = TOML_READERS[kind]
    path = put(folder / "pyproject.toml", as_toml(data.draw(mutated([document]))))
    value_or_refusal(lambda: read(path), UsageError)


@cache
def pipeline_files() -> dict[str, Any]:
    """The configuration of a saved pipeline, by file."""
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.40.0",
            "requires_safety_checker": False,
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "unet/config.json": {"_class_name": "UNet2DConditionModel", "sample_size": 96, "cross_attention_dim": 32},
        "vae/config.json": {"block_out_channels": [1, 2, 3, 4], "sample_size": 512},
        "text_encoder/config.json": {"max_position_embeddings": 77, "architectures": ["CLIPTextModel"]},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "beta_end": 0.012},
    }


@given(mutated([pipeline_files()]))
def test_a_saved_pipeline(tmp_path_factory: pytest.TempPathFactory, files: Any) -> None:
    here = tmp_path_factory.mktemp("pipeline")
    for name in pipeline_files():
        (here / name).parent.mkdir(exist_ok=True)
        if name in files:
            put(here / name, as_json(files[name]))
    model = value_or_refusal(lambda: model_from_folder(here, with_weights=False), UsageError)
    if model is not None:
        assert set(model.components) <= {"unet", "vae", "text_encoder", "transformer", "scheduler"}
        assert model.native.width * model.native.height <= 65536**2
        assert "/" not in model.name


@cache
def a_document() -> str:
    header = '<!-- pytest-vram report {"runs": ["run.json"], "cards": [], "headless": false} -->'
    return f"{header}\n# Which GPU\n\n## Runs\n\n| run | file |\n| --- | --- |\n| R1 | `run.json` |\n"


@given(st.data())
def test_a_document(folder: Path, data: st.DataObject) -> None:
    lines = a_document().split("\n")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        lines[at] = data.draw(st.one_of(texts, texts.map(lambda text: f"| {text} |"), st.just(lines[at] + lines[at])))
    path = put(folder / "HARDWARE.md", "\n".join(lines).encode("utf-8", "surrogatepass"))
    text = value_or_refusal(lambda: read_text(path), RunFileError)
    if text is None:
        return
    value_or_refusal(lambda: made_from(text, path), UsageError)
    list(differences(text, a_document(), {}))


@given(texts)
def test_names_that_become_paths(name: str) -> None:
    assert slug(name).replace("-", "").isalnum()
    assert ".." not in slug(name)
    assert "/" not in new_path(Path(), {"commit": name, "dirty": name}).name


@given(st.one_of(texts, st.sampled_from(PLANTED)))
def test_a_name_that_nobody_knows(name: str) -> None:
    value_or_refusal(lambda: find_card(name, read_packaged_cards()), UsageError)
    value_or_refusal(lambda: parse_optimizations(name), UsageError, ValueError)  # type: ignore[arg-type]


@cache
def read_packaged_cards() -> Any:
    return read_cards()


def test_the_seeds_are_right(folder: Path) -> None:
    """Else the changes would be made to files that nobody reads anyway."""
    for number, document in enumerate(run_files()):
        assert read_run(put(folder / f"seed{number}.json", as_json(document))).records
    for read, document in TOML_READERS.values():
        assert read(put(folder / "pyproject.toml", as_toml(document)))
    assert read_comparison(put(folder / "seed.json", as_json(comparisons()[0]))).cases
    assert read_models()
    assert_one_line("a line")

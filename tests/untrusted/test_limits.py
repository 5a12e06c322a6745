"""What would take all memory or all time is refused before it does, and the line says what is wrong."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.cases.models import model_from_folder, read_model
from pytest_vram.cases.sweep import Matrix, Overrides, expand
from pytest_vram.cases.toml import read_toml
from pytest_vram.errors import MAX_MESSAGE, RunFileError, UsageError, VramError
from pytest_vram.pipelines.optimizations import parse_optimizations
from pytest_vram.records import files, reading
from pytest_vram.records.files import read_journal, read_run
from pytest_vram.records.reading import read_runs
from pytest_vram.records.schema import SCHEMA
from pytest_vram.untrusted import MAX_DEPTH, MAX_FILE_BYTES, MAX_TEXT, MAX_TOML_BYTES, MAX_VALUES
from tests.records.test_schema import facts
from tests.untrusted.strategies import as_json, as_toml, assert_one_line, nested, put
from tests.untrusted.test_readers import MATRIX, TINY, model_document, pipeline_files, tiny_alone

ROOT = Path(__file__).parents[2]


def vram(**changes: Any) -> dict[str, Any]:
    return {"vram": {"schema": 1, "environment": {}, "sweep": "default", "records": [], **changes}}


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(VramError) as caught:
        call(*arguments, **options)
    assert_one_line(str(caught.value))
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"vram": [' + b"[]," * 1_000_001 + b"0]}", "more values than"),
        (b'{"vram": [' + b"1," * (MAX_VALUES + 1) + b"0]}", "more values than"),
        (as_json(vram(environment={"x": nested(MAX_DEPTH)})), f"more than {MAX_DEPTH} deep"),
        (as_json(vram(environment={"gpu": "x" * (MAX_TEXT + 1)})), "a text of more than 100,000 letters"),
        (as_json(vram(environment={"x" * (MAX_TEXT + 1): 1})), "a text of more than 100,000 letters"),
    ],
    ids=["lists", "numbers", "nesting", "a text", "a key"],
)
def test_a_json_file_too_large_in_what_it_holds(content: bytes, problem: str, tmp_path: Path) -> None:
    assert problem in refusal(read_run, put(tmp_path / "run.json", content))
    assert refusal(read_journal, put(tmp_path / "run.jsonl", content + b"\n"))


def test_a_run_file_of_too_many_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_RECORDS", 3)
    path = put(tmp_path / "run.json", as_json(vram(records=[facts(id=str(n)) for n in range(4)])))
    assert "records: are more than 3; split the sweep with --vram-shard" in refusal(read_run, path)


def test_too_many_files_and_records_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        put(tmp_path / f"{name}.json", as_json(vram(records=[facts()])))
    assert len(read_runs([tmp_path])[0]) == 3
    monkeypatch.setattr(reading, "MAX_RECORDS", 2)
    assert "more than 2 records; name fewer at once" in refusal(read_runs, [tmp_path])
    monkeypatch.setattr(reading, "MAX_FILES", 2)
    assert "3 files, above 2; name fewer at once" in refusal(read_runs, [tmp_path])


def test_a_file_that_grows_without_end_is_not_followed(tmp_path: Path) -> None:
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    assert "is larger than 64 MiB" in refusal(read_runs, [tmp_path])
    with (tmp_path / "matrix.toml").open("wb") as file:
        file.truncate(MAX_TOML_BYTES + 1)
    assert "is larger than 1 MiB" in refusal(read_toml, tmp_path / "matrix.toml", Matrix)
    assert "is no file" in refusal(read_run, Path("/dev/zero"))


def test_a_link_that_leads_out_of_the_folder_is_passed_over(tmp_path: Path) -> None:
    outside = put(tmp_path / "outside.json", as_json(vram(records=[facts(id="secret")])))
    (tmp_path / "runs" / "gpu").mkdir(parents=True)
    inside = put(tmp_path / "runs" / "gpu" / "a.json", as_json(vram(records=[facts()])))
    (tmp_path / "runs" / "link.json").symlink_to(outside)
    (tmp_path / "runs" / "again.json").symlink_to(inside)
    runs, notes = read_runs([tmp_path / "runs"])
    assert [run.records[0].id for run in runs] == [facts()["id"]]
    assert notes == [f"passed over {tmp_path / 'runs' / 'link.json'}: the link leads out of the folder"]
    assert [run.records[0].id for run in read_runs([tmp_path / "runs" / "link.json"])[0]] == ["secret"]


def expanded(tmp_path: Path, **axes: list[Any]) -> Any:
    block = {"models": ["tiny-sd"], "optimizations": ["fp16"], **axes}
    path = put(tmp_path / "matrix.toml", as_toml({"sweeps": {"s": {"blocks": {"b": block}}}}))
    sweep = read_toml(path, Matrix).sweeps["s"]
    return expand(sweep, "matrix.toml: sweeps.s", tiny_alone(), parse_optimizations, Overrides())


def test_a_matrix_of_a_million_million_cases_is_not_expanded(tmp_path: Path) -> None:
    began = time.monotonic()
    sizes, batches = [2 * n for n in range(1, 10_001)], list(range(1, 10_001))
    said = refusal(expanded, tmp_path, resolutions=sizes, batch_sizes=batches, frames=["native"] * 10_000)
    at = "matrix.toml: sweeps.s.blocks.b"
    assert said.startswith(f"{at}: the product of its axes is 1,000,000,000,000 cases, above 100,000")
    assert time.monotonic() - began < 60  # far from what so many would take
    assert len(expanded(tmp_path, resolutions=sizes[:10], batch_sizes=batches[:10])) == 100


@pytest.mark.parametrize(
    ("axis", "value"),
    [("resolutions", 10**9), ("resolutions", f"64x{10**9}"), ("batch_sizes", 10**9), ("batch_sizes", 10**400)],
)
def test_a_size_that_nothing_has(axis: str, value: Any, tmp_path: Path) -> None:
    assert refusal(expanded, tmp_path, **{axis: [value]}).startswith(f"matrix.toml: sweeps.s.blocks.b.{axis}: ")


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 200_000 + " = 1",
        f"[{'a.' * 100_000}a]\n" + "b=1\n" * 100_000,
        '"a"' + ' . "b"' * 50 + " = 1",
        "x = " + "{a=" * 50_000,
        "x = " + "[" * 50_000,
        "x = " + "[" * 500 + "]" * 500,
        "x = " + "9" * 5_000,
        f'x = "{"x" * (MAX_TEXT + 1)}"',
    ],
    ids=["dotted key", "dotted table", "quoted", "tables", "open lists", "lists", "digits", "text"],
)
def test_toml_that_would_take_for_ever(text: str, tmp_path: Path) -> None:
    began = time.monotonic()
    refusal(read_toml, put(tmp_path / "matrix.toml", text.encode()), Matrix)
    assert time.monotonic() - began < 20  # tomllib takes hours for the second


def changed(tmp_path: Path, *path: str, value: Any) -> Path:
    """The tiny model with one key of it changed."""
    document = model_document()
    holder = document
    for key in path[:-1]:
        holder = holder.setdefault(key, {})
    holder[path[-1]] = value
    return put(tmp_path / "model.toml", as_toml(document))


CONFIG = ("components", "unet", "config")


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("native", "width"), 10**9, "native.width: "),
        (("native", "steps"), 10**9, "native.steps: "),
        (("native", "guidance_scale"), 10**400, "native.guidance_scale: "),
        (("components", "unet", "parameters"), 10**16, "components.unet.parameters: "),
        (("components", "../../etc"), {"library": "diffusers", "class": "X"}, "components.../../etc"),
        ((*CONFIG, "num_layers"), 10**6, "components.unet.config: num_layers: 1000000 is above 10000"),
        ((*CONFIG, "layers_per_block"), [2, 10**9], "config: layers_per_block: 1000000000 is above"),
        ((*CONFIG, "cross_attention_dim"), 10**13, "config: cross_attention_dim: "),
        ((*CONFIG, "auto_map"), {"AutoModel": "evil.Model"}, "config: auto_map makes a library run"),
        ((*CONFIG, "attn_implementation"), "stranger/kernels", "attn_implementation 'stranger/kernels' is code"),
        (("hub_id",), "x" * 300, "hub_id: is no id of the hub, and no folder"),
        (("name",), "../../evil", "name: "),
        (("denoiser",), "x\x1b[31m" * 100, "denoiser: "),
    ],
)
def test_an_architecture_beyond_all_bounds(path: tuple[str, ...], value: Any, problem: str, tmp_path: Path) -> None:
    assert problem in refusal(read_model, changed(tmp_path, *path, value=value))


def saved(folder: Path, **changes: Any) -> Path:
    for name, content in {**pipeline_files(), **changes}.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        put(folder / name, as_json(content))
    return folder


def test_a_part_of_a_saved_pipeline_stays_in_its_folder(tmp_path: Path) -> None:
    secret = saved(tmp_path / "secret")
    index = {**pipeline_files()["model_index.json"], f"../{secret.name}/unet": ["diffusers", "UNet2DConditionModel"]}
    folder = saved(tmp_path / "model", **{"model_index.json": index})
    assert "'../secret/unet' is no name of a part" in refusal(model_from_folder, folder, with_weights=False)


@pytest.mark.parametrize("library", ["os", "evil", "evil.py", "../evil", 1, ["diffusers"]])
def test_a_part_of_another_library_is_not_loaded(library: Any, tmp_path: Path) -> None:
    index = {**pipeline_files()["model_index.json"], "tokenizer": [library, "Tokenizer"]}
    folder = saved(tmp_path, **{"model_index.json": index})
    for part in ("unet", "vae", "text_encoder"):
        put(folder / part / "diffusion_pytorch_model.safetensors", b"")
    assert "parts of diffusers and of transformers are loaded, and no other code" in refusal(model_from_folder, folder)


@pytest.mark.parametrize("weights", ["diffusion_pytorch_model.bin", "pytorch_model.pt", "model.ckpt"])
def test_a_folder_with_pickled_weights_alone_is_refused(weights: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        put(folder / part / weights, b"\x80\x04cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    assert "no .safetensors file; weights are loaded from nothing else" in refusal(model_from_folder, folder)


def test_a_message_is_one_line_whatever_it_is_about() -> None:
    said = str(UsageError("a\x1b[31m\u202e\nb" + "c" * 10_000))
    assert said.startswith("a [31m  bccc")
    assert len(said) == MAX_MESSAGE
    assert_one_line(said)
    assert str(RunFileError("a folder/with  two spaces")) == "a folder/with  two spaces"


def test_an_architecture_of_a_million_billion_parameters_takes_no_host_memory(tmp_path: Path) -> None:
    from pytest_vram.measure.probes import bound_host_memory
    from pytest_vram.pipelines.build import architecture_problem

    model = read_model(changed(tmp_path, *CONFIG, "block_out_channels", value=[10_000_000, 20_000_000]))
    before, peak = resource.getrlimit(resource.RLIMIT_DATA), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        bound_host_memory(4 << 30)
        assert resource.getrlimit(resource.RLIMIT_DATA) != before
        problem = architecture_problem(model.model_copy(update={"source": "model.toml"}))
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert problem is not None
    assert problem.startswith("components.unet.config: UNet2DConditionModel refuses it: ")
    assert "memory" in problem
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 20  # KiB


# The schema


def test_a_newer_schema_is_refused_with_the_version_it_needs(tmp_path: Path) -> None:
    newer = vram(schema=SCHEMA + 1, environment={"pytest-vram": "0.9.0"}, records={"of": "another form"})
    said = refusal(read_run, put(tmp_path / "run.json", as_json(newer)))
    assert said.endswith("schema: 2 is newer than this pytest-vram reads (1); install the version that wrote it, 0.9.0")


@pytest.mark.parametrize("schema", [0, -1, 1.5, "1", None, [1]])
def test_a_schema_that_never_was_is_refused(schema: Any, tmp_path: Path) -> None:
    assert "schema: " in refusal(read_run, put(tmp_path / "run.json", as_json(vram(schema=schema))))


def test_a_file_without_a_schema_is_of_the_first_one(tmp_path: Path) -> None:
    document = vram(records=[facts()])
    del document["vram"]["schema"]
    assert len(read_run(put(tmp_path / "run.json", as_json(document))).records) == 1


def test_the_oldest_file_is_read_and_holds_what_it_held() -> None:
    """It was written before optional fields such as `exactness.claimed`, `gpus` and `gpu_lag_s` were."""
    oldest = min((ROOT / "results").glob("nvidia-*/*.json"), key=lambda path: path.name)
    document = json.loads(oldest.read_text(encoding="utf-8"))["vram"]
    run = read_run(oldest)
    assert "gpus" not in document["records"][0]
    assert [record.id for record in run.records] == [record["id"] for record in document["records"]]
    for record, was in zip(run.records, document["records"], strict=True):
        assert record.gpus == []
        assert record.memory.model_dump(include=set(was["memory"])) == was["memory"]


def test_the_matrix_of_the_other_tests_is_small() -> None:
    assert len(json.dumps(MATRIX)) < 2000
    assert TINY.is_file()

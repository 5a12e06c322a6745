"""No file that is read can bring code with it: no pickle, no code of the hub, nothing evaluated."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "plugin" / "pytest_vram"
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "read_pickle", "unsafe_load", "broadcast_object_list"}


def found_in(source: str) -> Iterator[str]:
    """What of a module could run what a file holds."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name.split(".")[0] in MODULES or name == "torch.load")
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            last = called.split(".")[-1]
            if called in CALLS or last in CALLS - {"compile", "eval"}:
                yield called
            loads_arrays = last == "load" and called.split(".")[0] in ("numpy", "np")
            if loads_arrays and ast.unparse(given.get("allow_pickle", ast.Constant(True))) != "False":
                yield f"{called} without allow_pickle=False"
            if last == "from_pretrained" and ast.unparse(given.get("use_safetensors", ast.Constant(False))) != "True":
                yield f"{called} without use_safetensors=True"
            if ast.unparse(given.get("trust_remote_code", ast.Constant(False))) != "False":
                yield f"{called} with trust_remote_code"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_runs_nothing_that_a_file_holds(path: Path) -> None:
    assert list(found_in(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "numpy.load('x')",
        "np.load('x', allow_pickle=True)",
        "pd.read_pickle('x')",
        "import joblib",
        "cls.from_pretrained('x')",
        "cls.from_pretrained('x', use_safetensors=False)",
        "cls.from_pretrained('x', use_safetensors=True, trust_remote_code=True)",
        "eval('1')",
        "exec(text)",
        "torch.distributed.broadcast_object_list(said)",
    ],
)
def test_what_would_is_found(source: str) -> None:
    assert list(found_in(source))


def test_what_is_harmless_is_not() -> None:
    assert list(found_in("network.eval(); re.compile('x'); json.load(f); numpy.load(f, allow_pickle=False)")) == []

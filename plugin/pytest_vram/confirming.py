"""Times that look slower than the base's, measured again in fresh workers: of both sides, or of the head's alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pytest_vram.against import FOLDER, Base
from pytest_vram.cases.case import AnyCase
from pytest_vram.cases.models import is_folder
from pytest_vram.compare.timing import WORKERS, Again
from pytest_vram.measure.again import top_of
from pytest_vram.measure.channel import Message
from pytest_vram.measure.machine import Machine
from pytest_vram.measure.measurement import Settings, measure
from pytest_vram.measure.timeout import LEAST_S
from pytest_vram.planning import Options
from pytest_vram.records.reading import ReadRun


@dataclass(frozen=True)
class Confirmation:
    """What it takes to measure single cases of a sweep once more.

    `jobs` and `node_ids` are by case id: what a worker is told, and the test.
    """

    base: Base
    options: Options
    root: Path
    machine: Machine | None
    jobs: Mapping[str, tuple[AnyCase, Message]]
    node_ids: Mapping[str, str]
    say: Callable[[str], None]
    settings: Callable[[str], Settings]  # of a case, by its id

    def again(self, head: ReadRun) -> tuple[dict[str, Again], list[str]]:
        """Fresh workers for the cases that look slower: of both sides, or of the head's alone."""
        names = self.base.flagged(head)
        if self.base.checkout is not None:
            models = {record.id: record.case.model for record in head.records}
            tests = {name: self.node_ids[name] for name in names if name in self.node_ids}
            installed = [name for name in tests if self.base.checkout.shared and self._is_installed(name)]
            tests = {name: node for name, node in tests.items() if name not in installed}
            folder = (head.path.parent / FOLDER / head.path.stem).absolute()
            longest_s = max((self.settings(name).timeout_s or 0.0 for name in tests), default=LEAST_S)
            options = partial(self._options_again, timeout_s=longest_s)
            again, notes = self.base.measure_again(tests, models, options, folder, longest_s, self.say)
            if installed:
                notes.append(
                    f"{installed[0]}: its pipeline is imported from outside the checkout, and would be the same on "
                    "both sides: give the base's checkout a .venv of its own"
                )
            names = [name for name in names if name not in again]
        else:
            again, notes = {}, []
        for name in names:
            settings = replace(self.settings(name), workers=WORKERS, need=False, save_images=None, leak_calls=None)
            if self.base.has_stored_workers(name) and name in self.jobs and self.machine:
                self.say(f"{name} again")
                record = measure(*self.jobs[name], self.machine, settings, self.say)
                again[name] = Again((), [record]) if record.status == "ok" else Again((), ())
        return {name: one for name, one in again.items() if one.head}, notes

    def _is_installed(self, name: str) -> bool:
        """Whether the functions of a test's own pipeline come from elsewhere than the checkout."""
        _, job = self.jobs.get(name, (None, {}))
        files = [Path(job["own"][role]["file"]) for role in ("build", "call")] if "own" in job else []
        return any(not file.resolve().is_relative_to(top_of(self.root)) for file in files)

    def _options_again(self, root: Path, timeout_s: float) -> list[str]:
        """pytest's options with which a checkout measures single cases of this sweep once more."""
        options, settings, overrides = self.options, self.options.settings, self.options.overrides
        given: dict[str, Any] = {
            "device": options.device,
            "sweep": options.sweep,
            "models": overrides.models and ",".join(map(_whole_path, overrides.models)),
            "optimizations": overrides.optimizations and ",".join(overrides.optimizations),
            "resolutions": overrides.resolutions and ",".join(overrides.resolutions),
            "frames": overrides.frames and ",".join(overrides.frames),
            "batch-sizes": overrides.batch_sizes and ",".join(map(str, overrides.batch_sizes)),
            "steps": overrides.steps,
            "rounds": settings.rounds,
            "weights": options.weights,
            "limit": options.limit_bytes and f"{options.limit_bytes}B",
            "timeout": math.ceil(timeout_s),
        }
        if options.matrix is not None:
            matrix, top = options.matrix.resolve(), top_of(self.root)
            given["matrix"] = top_of(root) / matrix.relative_to(top) if matrix.is_relative_to(top) else matrix
        said = [f"--vram-{name}={value}" for name, value in given.items() if value]
        flags = ["--vram-no-need", "--vram-no-estimate", "--vram-compare="]
        return said + flags + (["--vram-allow-shared"] if options.allow_shared else [])


def _whole_path(model: str) -> str:
    """A saved pipeline's folder from wherever it is looked for; a name or hub id as it is."""
    return str(Path(model).resolve()) if is_folder(model) and Path(model).exists() else model

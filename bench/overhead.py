"""What pytest-vram itself costs. Each part prints ratios or medians of one run:

python bench/overhead.py plugin      an empty pytest run with and without the plugin (15 alternations)
python bench/overhead.py collection  pytest --collect-only over a sweep of 1,000 cases
python bench/overhead.py sampling    rounds with NVML sampled and not, in turn, in one worker (needs a GPU)
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PLUGIN = Path(__file__).parents[1] / "plugin"
sys.path.insert(0, str(PLUGIN))

ALTERNATIONS = 10


def seconds(command: Sequence[str], folder: str) -> float:
    """The wall time of one command."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PLUGIN), os.environ.get("PYTHONPATH", "")])}
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environ, capture_output=True, check=True)
    return time.perf_counter() - began


def plugin() -> None:
    """An empty run: nothing collected, no other plugin loaded on either side."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_one.py").write_text("def test_one():\n    pass\n", encoding="utf-8")
        without = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-plugin-autoload"]
        with_it = [*without, "-p", "pytest_vram.plugin"]
        seconds(without, folder), seconds(with_it, folder)
        pairs = [(seconds(without, folder), seconds(with_it, folder)) for _ in range(15)]
    added = statistics.median(b - a for a, b in pairs)
    ratio = statistics.median(b / a for a, b in pairs)
    base = statistics.median(a for a, _ in pairs)
    print(f"an empty run: {base * 1000:.0f} ms; the plugin adds {added * 1000:.1f} ms (ratio {ratio:.3f})")


def collection() -> None:
    """1,000 cases: 50 resolutions × 20 batch sizes of one model."""
    sizes = ",".join(str(512 + 8 * n) for n in range(50))
    batches = ",".join(str(n) for n in range(1, 21))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(PLUGIN.parent / "bench")]
    command += ["--vram-models=sdxl", "--vram-optimizations=fp16"]
    command += [f"--vram-resolutions={sizes}", f"--vram-batch-sizes={batches}", "--vram-sweep=smoke"]
    times = [seconds(command, str(PLUGIN.parent)) for _ in range(5)]
    output = subprocess.run(command, cwd=PLUGIN.parent, capture_output=True, text=True, check=True).stdout
    print(f"{output.splitlines()[-1]}; median of 5: {statistics.median(times):.2f} s")


def _measured(ids: Sequence[tuple[str, int, int, int]], run: Callable[..., None]) -> None:
    """Run `run(case, model, machine)` on (model, pixels, batch size, steps) in fp16."""
    from pytest_vram.cases.case import Case
    from pytest_vram.cases.models import read_models
    from pytest_vram.measure.machine import start_machine

    models = read_models()
    chosen = {name: models[name] for name, *_ in ids}
    machine = start_machine("cuda", chosen.values(), allow_shared=False, name_host=False, say=print)
    try:
        for name, size, batch_size, steps in ids:
            native = models[name].native
            case = Case(
                model=name,
                optimizations=("fp16",),
                height=size,
                width=size,
                batch_size=batch_size,
                steps=steps,
                guidance_scale=native.guidance_scale,
                sequence_length=native.sequence_length,
                scheduler=models[name].scheduler.class_name,
            )
            run(case, models, machine)
    finally:
        machine.close()


def sampling() -> None:
    """One worker; NVML is read in every other round. GPU-bound and CPU-bound cases."""
    from pytest_vram.measure.job import job_of
    from pytest_vram.measure.measurement import Settings, measure

    class Switched:
        """A GPU that is not asked while it is off."""

        def __init__(self, gpu: Any) -> None:
            self.gpu, self.on = gpu, True

        def __getattr__(self, name: str) -> Any:
            return getattr(self.gpu, name)

        def used_bytes(self) -> int | None:
            return self.gpu.used_bytes() if self.on else None

        def processes(self) -> dict[int, int | None]:
            return self.gpu.processes() if self.on else {}

        def state(self) -> Any:
            return self.gpu.state() if self.on else OFF

    from pytest_vram.measure.nvml import State

    OFF = State(None, None, None, ())

    def run(case: Any, models: Any, machine: Any) -> None:
        gpu, rounds = machine.gpu, 2 * ALTERNATIONS * (3 if case.batch_size == 1 else 1)
        machine.gpu = switched = Switched(gpu)

        def switch(progress: str) -> None:
            if progress.startswith("round "):
                switched.on = int(progress.split()[1]) % 2 == 0  # the rounds numbered 0, 2, … are sampled

        settings = Settings(rounds=rounds, need=False)
        record = measure(case, job_of(case, models[case.model]), machine, settings, switch)
        machine.gpu = gpu
        times = record.time.workers[0].rounds_s
        ratios = [on / off for on, off in zip(times[::2], times[1::2], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        print(
            f"{case.id}: {len(ratios)} alternations, sampled / not: median {statistics.median(ratios):.4f}, "
            f"quartiles {low:.4f} to {high:.4f}; ratio of medians "
            f"{statistics.median(times[::2]) / statistics.median(times[1::2]):.4f}"
        )

    _measured([("stable-diffusion-v1-5", 1024, 4, 8), ("sdxl", 1024, 4, 8), ("stable-diffusion-v1-5", 512, 1, 8)], run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"plugin": plugin, "collection": collection, "sampling": sampling}
    parser.add_argument("part", choices=list(parts))
    parts[parser.parse_args().part]()

"""What must be the same for two runs to be compared, and what is only remarked."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from pytest_vram.cases.case import AnyCase, Case, OwnCase
from pytest_vram.compare.comparison import Difference
from pytest_vram.errors import UsageError, unknown
from pytest_vram.records.schema import Record, Run

# Another of these changes what is measured, whatever the commit did. `driver` is compared by its branch.
HARD = ("gpu", "mig", "power_limit_w", "driver", "torch", "cuda", "device", "start", "variables")
# Another of these may be what the commit did, or moves time more than memory.
REMARKED = (
    "diffusers",
    "transformers",
    "accelerate",
    "pytest-vram",
    "python",
    "cudnn",
    "driver version",
    "gpu_uuid",
    "host",
    "cpu",
    "cpus",
    "os",
)
METHOD = "method"
CASE = tuple(Case.model_fields)
_IN_THE_ID = ("model", "optimizations", "height", "width", "frames", "batch_size", "limit_bytes")


def known_key(text: str, option: str) -> str:
    """A key that `option` may lift.

    Raises:
        UsageError: with the nearest one.
    """
    keys = (*HARD, METHOD, *(key for key in CASE if key not in _IN_THE_ID))
    if text not in keys:
        raise UsageError(f"{option}: {unknown('key', text, keys)}")
    return text


def _values(run: Run) -> dict[str, Any]:
    """The environment, with the device, and with the driver's branch beside its version."""
    found = dict(run.environment)
    driver = found.get("driver")
    found["driver version"] = driver
    found["driver"] = driver.split(".")[0] if isinstance(driver, str) else driver
    found["variables"] = found.get("variables") or {}
    found["device"] = run.options.get("device")
    return found


def hard_differences(base: Run, head: Run) -> list[Difference]:
    """Why two runs are not comparable."""
    return list(_differences(HARD, _values(base), _values(head)))


def remarks(base: Run, head: Run) -> list[Difference]:
    """What else differs between two environments."""
    return list(_differences(REMARKED, _values(base), _values(head)))


def _differences(keys: Iterable[str], base: Mapping[str, Any], head: Mapping[str, Any]) -> Iterator[Difference]:
    for key in keys:
        if base.get(key) != head.get(key):
            yield Difference.of(key, base.get(key), head.get(key))


def case_difference(base: Record, head: Record, across: Collection[str]) -> Difference | None:
    """Why two records of one id are not comparable, or None."""
    if base.method != head.method and METHOD not in across:
        return Difference.of(METHOD, base.method, head.method)
    return identity_difference(base.case, head.case, across)


def identity_difference(base: AnyCase, head: AnyCase, across: Collection[str]) -> Difference | None:
    """The same of two cases. Of a test's own pipeline the test is the identity: its functions may be renamed."""
    kinds = ["a test's own" if isinstance(case, OwnCase) else "a sweep's" for case in (base, head)]
    if kinds[0] != kinds[1]:
        return Difference.of("case", *kinds)
    if isinstance(base, OwnCase):
        return None
    return next((d for d in _differences(CASE, base.model_dump(), head.model_dump()) if d.key not in across), None)

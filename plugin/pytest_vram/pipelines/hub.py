"""The architecture of a pipeline on the Hugging Face hub, from its configuration files alone."""

import re
from pathlib import Path

from pytest_vram.cases.models import Model, model_from_folder
from pytest_vram.errors import UsageError
from pytest_vram.untrusted import is_there

CONFIGURATIONS = ("model_index.json", "*/config.json", "scheduler/scheduler_config.json")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether `name` reads like owner/name and is no folder here."""
    return HUB_ID.fullmatch(name) is not None and not is_there(Path(name))


def model_from_hub(hub_id: str) -> Model:
    """The architecture of the pipeline `hub_id`; its configuration files are fetched, its weights are not.

    Raises:
        UsageError: when the hub does not answer, or holds no diffusers pipeline by this name.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(hub_id, allow_patterns=list(CONFIGURATIONS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--vram-models: {hub_id} is no folder here, and the hub does not give it: {reason}"
        ) from error
    model = model_from_folder(Path(folder), with_weights=False)
    digits = model.name.rsplit("-", 1)[1]  # of the configuration; the rest is the cache's
    stem = re.sub(r"[^a-z0-9._-]+", "-", hub_id.split("/")[1].lower()).strip("-._") or "model"
    return model.model_copy(update={"hub_id": hub_id, "name": f"{stem[:100]}-{digits}"})

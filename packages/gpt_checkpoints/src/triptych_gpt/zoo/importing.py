"""`triptych-gpt import`: checkpoints that others have saved become an ordinary zoo."""

from collections.abc import Callable
from typing import Any

from triptych_common.cli import located

from triptych_gpt.settings import ImportConfig


def import_zoo(config: ImportConfig) -> dict[str, Any]:
    """Write the zoo, or the rest of it; returns counts. Raises what the kinds of imports raise, ValueError without a source."""
    return _of_source("import", config)(config)


def preview(config: ImportConfig) -> dict[str, Any]:
    """What --dry-run prints."""
    return _of_source("preview", config)(config)


def _of_source(action: str, config: ImportConfig) -> Callable[[ImportConfig], dict[str, Any]]:
    """The function for the source that is given, the first of several."""
    for kind in ("lmdb", "sb3", "folder"):
        if getattr(config, kind) is not None:
            return located(f"triptych_gpt.zoo.{kind}_import:{action}_{kind}")
    raise ValueError(
        "nothing to import: give --folder FOLDER of checkpoints, --sb3 FOLDER of policies or --lmdb FOLDER of released data"
    )

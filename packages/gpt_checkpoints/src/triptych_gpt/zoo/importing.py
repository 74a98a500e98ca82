"""`triptych-gpt import`: checkpoints that others have saved become an ordinary zoo."""

from typing import Any

from triptych_gpt.settings import ImportConfig


def import_zoo(config: ImportConfig) -> dict[str, Any]:
    """Write the zoo, or the rest of it; returns counts. Raises what the kinds of imports raise, ValueError without a source."""
    if config.lmdb is not None:
        from triptych_gpt.zoo.lmdb_import import import_lmdb

        return import_lmdb(config)
    if config.sb3 is not None:
        from triptych_gpt.zoo.sb3_import import import_sb3

        return import_sb3(config)
    _check_source(config)
    from triptych_gpt.zoo.folder_import import import_folder

    return import_folder(config)


def preview(config: ImportConfig) -> dict[str, Any]:
    """What --dry-run prints."""
    if config.lmdb is not None:
        from triptych_gpt.zoo.lmdb_import import preview_lmdb

        return preview_lmdb(config)
    if config.sb3 is not None:
        from triptych_gpt.zoo.sb3_import import preview_sb3

        return preview_sb3(config)
    _check_source(config)
    from triptych_gpt.zoo.folder_import import preview_folder

    return preview_folder(config)


def _check_source(config: ImportConfig) -> None:
    if config.folder is None:
        raise ValueError(
            "nothing to import: give --folder FOLDER of checkpoints, --sb3 FOLDER of policies or --lmdb FOLDER of released data"
        )

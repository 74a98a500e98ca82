"""The command `triptych-gpt`."""

import sys
from collections.abc import Sequence

from triptych_common.cli import Command, main


def _collect() -> Command:
    from triptych_gpt.zoo.collect import collect
    from triptych_gpt.zoo.collect_config import PRESETS, CollectConfig

    return Command(CollectConfig, collect, PRESETS)


def _info() -> Command:
    from triptych_gpt.zoo.inspect import InfoConfig, info

    return Command(InfoConfig, info, {})


def _verify() -> Command:
    from triptych_gpt.zoo.inspect import VerifyConfig, verify

    return Command(VerifyConfig, verify, {})


def _export() -> Command:
    from triptych_gpt.zoo.inspect import ExportConfig, export

    return Command(ExportConfig, export, {})


def _import() -> Command:
    from triptych_gpt.tasks import open_task
    from triptych_gpt.zoo.lmdb_import import ImportConfig, import_lmdb

    return Command(ImportConfig, lambda config: import_lmdb(config, open_task(config.task).layout), {})


COMMANDS = {
    "collect": ("train networks in many runs, and keep their checkpoints", _collect),
    "info": ("what a zoo holds", _info),
    "verify": ("compare a zoo's files with their checksums", _verify),
    "export": ("one checkpoint as a plain state dict", _export),
    "import": ("make a zoo of the released G.pt data", _import),
}


def run(argv: Sequence[str] | None = None) -> int:
    """`collect --task T` means `collect T`."""
    words = [w for word in (sys.argv[1:] if argv is None else argv) for w in _split_task(word)]
    if words[:1] == ["collect"] and "--task" in words:
        words.remove("--task")
    if words[:1] == ["collect"] and not {"-h", "--help", "--dry-run", "here", "ray"} & set(words):
        from triptych_gpt.zoo.server import start

        start()  # workers' imports and ours take seconds each, so side by side
    return main("triptych-gpt", COMMANDS, words)


def _split_task(word: str) -> list[str]:
    return ["--task", word.removeprefix("--task=")] if word.startswith("--task=") else [word]


if __name__ == "__main__":
    sys.exit(run())

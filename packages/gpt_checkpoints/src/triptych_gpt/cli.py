"""The command `triptych-gpt`."""

import sys
import warnings
from collections.abc import Sequence

from triptych_common.cli import Command, deferred, main


def _collect() -> Command:
    from triptych_gpt.zoo.collect_config import PRESETS, CollectConfig

    preview = deferred("triptych_gpt.zoo.collect:preview")
    return Command(CollectConfig, deferred("triptych_gpt.zoo.collect:collect"), PRESETS, preview=preview)


def _info() -> Command:
    from triptych_gpt.settings import InfoConfig

    return Command(InfoConfig, deferred("triptych_gpt.zoo.inspect:info"), {})


def _verify() -> Command:
    from triptych_gpt.settings import VerifyConfig

    return Command(VerifyConfig, deferred("triptych_gpt.zoo.inspect:verify"), {})


def _export() -> Command:
    from triptych_gpt.settings import ExportConfig

    return Command(ExportConfig, deferred("triptych_gpt.zoo.inspect:export"), {})


def _import() -> Command:
    from triptych_gpt.settings import ImportConfig

    preview = deferred("triptych_gpt.zoo.lmdb_import:preview")
    return Command(ImportConfig, deferred("triptych_gpt.zoo.lmdb_import:import_command"), {}, preview=preview)


def _train() -> Command:
    from triptych_gpt.train_config import TRAIN_PRESETS, GptTrainConfig

    train, preview = deferred("triptych_gpt.train:train"), deferred("triptych_gpt.objective:plan")
    return Command(GptTrainConfig, train, TRAIN_PRESETS, default="laptop", preview=preview)


def _prompt() -> Command:
    from triptych_gpt.settings import PromptConfig

    return Command(PromptConfig, deferred("triptych_gpt.prompting:prompt_command"), {})


def _evaluate() -> Command:
    from triptych_gpt.settings import EvaluateConfig

    return Command(EvaluateConfig, deferred("triptych_gpt.evaluate:evaluate"), {})


def _audit() -> Command:
    from triptych_gpt.settings import AuditConfig

    return Command(AuditConfig, deferred("triptych_gpt.audit:audit_command"), {})


def _convert() -> Command:
    from triptych_gpt.settings import ConvertConfig

    return Command(ConvertConfig, deferred("triptych_gpt.convert:convert"), {})


COMMANDS = {
    "collect": ("train many networks and store their checkpoints in a zoo", _collect),
    "info": ("describe what a zoo holds", _info),
    "verify": ("check a zoo's files against their checksums", _verify),
    "export": ("export one checkpoint as a plain state dict", _export),
    "import": ("import the released G.pt data as a zoo", _import),
    "train": ("train a G.pt on a zoo, or resume", _train),
    "prompt": ("generate networks that achieve a prompted metric", _prompt),
    "evaluate": ("score how well a trained G.pt follows prompts on unseen networks, beside baselines", _evaluate),
    "audit": ("compare generated networks with the training set: new, or memorised?", _audit),
    "convert": ("convert a released G.pt's checkpoint to a model file", _convert),
}


def run(argv: Sequence[str] | None = None) -> int:
    """`collect --task T` means `collect T`."""
    words = [w for word in (sys.argv[1:] if argv is None else argv) for w in _split_task(word)]
    if words[:1] == ["collect"] and "--task" in words:
        words.remove("--task")
    if words[:1] == ["collect"] and not {"-h", "--help", "--dry-run", "here", "ray"} & set(words):
        from triptych_common.workers import start_server

        from triptych_gpt.zoo import PRELOAD

        start_server(PRELOAD)  # workers' imports and ours take seconds each, so side by side
    warnings.showwarning = _one_line
    return main("triptych-gpt", COMMANDS, words)


_told: set[str] = set()


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a line, once: where in the code it arose is nothing to its user."""
    if str(message) not in _told:
        _told.add(str(message))
        print(f"warning: {message}", file=sys.stderr, flush=True)


def _split_task(word: str) -> list[str]:
    return ["--task", word.removeprefix("--task=")] if word.startswith("--task=") else [word]


if __name__ == "__main__":
    sys.exit(run())

"""The command `triptych-gpt`."""

if __name__ == "__main__":  # before anything that takes time to import
    from triptych_common.interrupts import install

    install()

import sys
import warnings
from collections.abc import Sequence

from triptych_common.cli import Command, leave, main
from triptych_common.fields import printable

COMMANDS = {
    "collect": Command(
        "train many networks and store their checkpoints in a zoo",
        "triptych_gpt.zoo.collect_config:CollectConfig",
        "triptych_gpt.zoo.collect:collect",
        presets="triptych_gpt.zoo.collect_config:PRESETS",
        preview="triptych_gpt.zoo.collect:preview",
    ),
    "info": Command(
        "describe what a zoo holds",
        "triptych_gpt.settings:InfoConfig",
        "triptych_gpt.zoo.inspect:info",
        writes="nothing",
    ),
    "verify": Command(
        "check a zoo's files against their checksums",
        "triptych_gpt.settings:VerifyConfig",
        "triptych_gpt.zoo.inspect:verify",
        writes="nothing",
    ),
    "export": Command(
        "export one checkpoint as a plain state dict",
        "triptych_gpt.settings:ExportConfig",
        "triptych_gpt.zoo.inspect:export",
        writes="file",
    ),
    "import": Command(
        "import anybody's checkpoints, stable-baselines3's policies or the released G.pt data as a zoo",
        "triptych_gpt.settings:ImportConfig",
        "triptych_gpt.zoo.importing:import_zoo",
        preview="triptych_gpt.zoo.importing:preview",
    ),
    "train": Command(
        "train a G.pt on a zoo, or resume",
        "triptych_gpt.train_config:GptTrainConfig",
        "triptych_gpt.train:train",
        presets="triptych_gpt.train_config:TRAIN_PRESETS",
        default="laptop",
        start="triptych_common.training.settings:to_length",
        preview="triptych_gpt.train:preview",
    ),
    "prompt": Command(
        "generate networks that achieve a prompted metric",
        "triptych_gpt.settings:PromptConfig",
        "triptych_gpt.prompting:prompt_command",
    ),
    "evaluate": Command(
        "score how well a trained G.pt follows prompts on unseen networks, beside baselines",
        "triptych_gpt.settings:EvaluateConfig",
        "triptych_gpt.evaluate:evaluate",
    ),
    "audit": Command(
        "compare generated networks with the training set: new, or memorised?",
        "triptych_gpt.settings:AuditConfig",
        "triptych_gpt.audit:audit_command",
    ),
    "convert": Command(
        "convert a released G.pt's checkpoint to a model file",
        "triptych_gpt.settings:ConvertConfig",
        "triptych_gpt.convert:convert",
    ),
}


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line; `collect --task T` and `collect --task=T` mean `collect T`."""
    words = list(sys.argv[1:] if argv is None else argv)
    words = [word.removeprefix("--task=") if words[0] == "collect" else word for word in words]
    if words[:1] == ["collect"] and "--task" in words:
        words.remove("--task")
    if words[:1] == ["collect"] and not {"-h", "--help", "--dry-run", "here", "ray"} & set(words):
        from triptych_common.workers import start_server

        from triptych_gpt.zoo import PRELOAD

        start_server(PRELOAD)  # the workers' imports and ours take seconds each, so they run side by side
    warnings.showwarning = _one_line
    return main("triptych-gpt", COMMANDS, words)


_shown: set[str] = set()


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line, without its place in the code, and only once."""
    if str(message) not in _shown:
        _shown.add(str(message))
        print(f"warning: {printable(str(message))}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    leave(run())

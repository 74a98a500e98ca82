"""The other parts of a diffusers pipeline: scheduler and autoencoder, and the hub it may come from."""

import contextlib
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from triptych_common import schedulers
from triptych_common.cli import echo
from triptych_common.extras import import_extra

from triptych_dit.autoencoder.model import Autoencoder, load_autoencoder
from triptych_dit.config import DiTConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin

WEIGHTS = "diffusion_pytorch_model"
RELEASED_REPOSITORIES = ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512")  # the released weights, converted
_PREDICTIONS = {"noise": "epsilon", "sample": "sample"}
_PROCESS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
# Of a hub repository, besides the weights.
_FILES = ("triptych.json", "model_index.json", "scheduler/scheduler_config.json", "vae/config.json")


def import_diffusers() -> ModuleType:
    """The library. Raises ImportError, saying what to install, without it."""
    return import_extra("diffusers", "diffusers' format needs a package: pip install 'triptych-dit[latents]'")


def checked_scheduler(scheduler: "SchedulerMixin | str | None", predict: str) -> "SchedulerMixin":
    """A scheduler, an instance or by name, for the model's process. Raises ValueError for an instance for another one."""
    # Clipping would spoil latents, which exceed 1.
    wanted = {**_PROCESS, "prediction_type": _PREDICTIONS[predict], "clip_sample": False}
    if scheduler is None or isinstance(scheduler, str):
        kind = getattr(import_diffusers(), schedulers.find(scheduler or "DDIMScheduler"))
        parameters = inspect.signature(kind.__init__).parameters
        # DDIM and DDPM keep diffusers' "leading" timesteps, whose strides are the ones their steps assume; the solvers, whose
        # default is "linspace", get "trailing", which came closer to the exact solution.
        if "timestep_spacing" in parameters and parameters["timestep_spacing"].default == "linspace":
            wanted["timestep_spacing"] = "trailing"
        return kind(**{name: value for name, value in wanted.items() if name in parameters})
    wrong = _differences(scheduler.config, wanted)
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        wrong.append("variance_type, since the pipeline drops the learned variance (fixed_small will do)")
    if wrong:
        raise ValueError(f"export: {type(scheduler).__name__} does not suit the model in {', '.join(wrong)}")
    return scheduler


def prediction(scheduler: Mapping[str, Any], source: str) -> str:
    """The prediction of a pipeline's model according to its scheduler's config: "noise" or "sample".

    Raises ValueError for a process other than the released one, the only one that is sampled here.
    """
    wrong = _differences(scheduler, _PROCESS)
    kinds = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in kinds:
        wrong.append(f"prediction_type {kind} (expected {' or '.join(kinds)})")
    if wrong:
        raise ValueError(f"{source}: its scheduler is of another process: {', '.join(wrong)}")
    return kinds[kind]


def _differences(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    different = {name: value for name, value in wanted.items() if config.get(name, value) != value}
    return [f"{name} {config[name]} (expected {value})" for name, value in different.items()]


def checked_vae(
    vae: "AutoencoderKL | Autoencoder | str | Path", config: DiTConfig, facts: Mapping[str, Any]
) -> "AutoencoderKL":
    """The autoencoder's module. Raises ValueError if it is not that of the model's latents, or the pipeline cannot use it."""
    if isinstance(vae, str | Path):
        vae = load_autoencoder(str(vae))
    known = facts.get("autoencoder") or {}
    module = vae.module if isinstance(vae, Autoencoder) else vae
    theirs = module.config
    if "autoencoder" in facts and not known:
        raise ValueError("export: the model was trained on pixels, which no autoencoder decodes; leave --vae out")
    channels = theirs.latent_channels
    if channels != config.in_channels:
        raise ValueError(f"export: the autoencoder has {channels} latent channels, the model {config.in_channels}")
    if theirs.shift_factor:
        raise ValueError(f"export: the autoencoder has shift_factor {theirs.shift_factor}, which DiTPipeline ignores")
    if theirs.scaling_factor != known.get("scale_factor", theirs.scaling_factor):
        raise ValueError(
            f"export: the autoencoder has scaling_factor {theirs.scaling_factor}, "
            f"the model was trained with {known['scale_factor']}"
        )
    if isinstance(vae, Autoencoder) and known.get("sha256") not in (None, vae.sha256):
        raise ValueError(
            f"export: autoencoder {vae.spec} is not the one the model was trained with "
            f"({known['spec']}; SHA-256 {vae.sha256[:12]} for {known['sha256'][:12]})"
        )
    return module


def autoencoder_facts(theirs: Mapping[str, Any], source: str, known: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Facts of the autoencoder in a pipeline's folder, from its config, or those known of one that is stored elsewhere.

    Raises ValueError for an autoencoder of another kind.
    """
    if not theirs:
        return dict(known) if known else None
    if theirs.get("_class_name") != "AutoencoderKL" or not {"block_out_channels", "latent_channels"} <= theirs.keys():
        raise ValueError(f"{source}: its vae is a {theirs.get('_class_name')}; expected an AutoencoderKL")
    return {
        "sha256": None, "scale_factor": theirs.get("scaling_factor", 0.18215),
        "shift_factor": theirs.get("shift_factor") or 0.0, "downsampling": 2 ** (len(theirs["block_out_channels"]) - 1),
        "latent_channels": theirs["latent_channels"], **(known or {}), "spec": source,
    }  # fmt: skip


def fetched(name: str) -> Path:
    """The folder of a repository's transformer and configs in the hub's cache, to which they are downloaded if needed.

    Raises OSError if they cannot be downloaded, ImportError without the hub's library.
    """
    needs = f"{name}: no such folder, and the Hugging Face hub needs a package: pip install 'triptych-dit[latents]'"
    download = import_extra("huggingface_hub", needs).hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    echo(f"looking for {name} on the Hugging Face hub")
    # It would report each of its attempts, for half a minute.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        root = Path(download(name, "transformer/config.json")).parent.parent
        for file in _FILES:
            with contextlib.suppress(EntryNotFoundError):
                download(name, file)
        try:
            download(name, f"transformer/{WEIGHTS}.safetensors")
        except EntryNotFoundError:
            download(name, f"transformer/{WEIGHTS}.bin")
    except (OSError, ValueError) as error:
        here = f"{name}: no such file or folder here, and not available from the Hugging Face hub"
        raise OSError(f"{here} ({' '.join(str(error).split())[:200]}); check name and network") from error
    return root

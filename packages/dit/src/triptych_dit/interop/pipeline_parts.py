"""The other parts of a diffusers pipeline: scheduler and autoencoder, and the hub it may come from."""

import contextlib
import copy
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from triptych_common import schedulers
from triptych_common.cli import echo
from triptych_common.diffusion import NoiseSchedule
from triptych_common.extras import import_extra

from triptych_dit.autoencoder.model import Autoencoder, load_autoencoder
from triptych_dit.config import DiTConfig
from triptych_dit.weights import LatentSpace, Prediction

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin

WEIGHTS = "diffusion_pytorch_model"
RELEASED_REPOSITORIES = ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512")  # the released weights, converted
_PREDICTIONS = {"noise": "epsilon", "sample": "sample"}
_KINDS: dict[str, Prediction] = {"epsilon": "noise", "sample": "sample"}
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


def prediction(scheduler: Mapping[str, Any], source: str) -> Prediction:
    """The prediction of a pipeline's model according to its scheduler's config: "noise" or "sample".

    Raises ValueError for a process other than the released one, the only one that is sampled here.
    """
    wrong = _differences(scheduler, {**_PROCESS, "rescale_betas_zero_snr": False, "use_flow_sigmas": False})
    kind, betas = scheduler.get("prediction_type", "epsilon"), scheduler.get("trained_betas")
    name = scheduler.get("_class_name")
    if "Flow" in str(name) or ("beta_schedule" not in scheduler and name not in ("DDPMScheduler", "DDIMScheduler")):
        wrong.append(f"{name} has no betas (expected a scheduler such as DDIMScheduler)")
    if kind not in _KINDS:
        wrong.append(f"prediction_type {kind} (expected {' or '.join(_KINDS)})")
    if betas is not None and not _are_linear(betas):
        wrong.append("trained_betas are not the linear ones")
    if wrong:
        remedy = "pass --predict if the model was trained on the released process all the same"
        raise ValueError(f"{source}: its scheduler is of another process: {', '.join(wrong)}; {remedy}")
    return _KINDS[kind]


def _are_linear(betas: Any) -> bool:
    numbers = isinstance(betas, list) and all(isinstance(beta, int | float) for beta in betas)
    linear = NoiseSchedule.linear().betas
    return (
        numbers and len(betas) == len(linear) and bool(((torch.tensor(betas).to(linear) - linear).abs() < 1e-6).all())
    )


def _differences(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    different = {name: value for name, value in wanted.items() if config.get(name, value) != value}
    return [f"{name} {config[name]} (expected {value})" for name, value in different.items()]


def fitting_autoencoder(spec: str, channels: int) -> Autoencoder:
    """The autoencoder that is named for a model that does not say which it needs. Raises ValueError if its channels differ."""
    found = load_autoencoder(spec)
    if found.latent_channels != channels:
        raise ValueError(
            f"vae {spec}: has {found.latent_channels} latent channels, the model {channels}; pass another --vae"
        )
    return found


def checked_vae(
    vae: "AutoencoderKL | Autoencoder | str | Path", config: DiTConfig, facts: Mapping[str, Any]
) -> "Autoencoder":
    """The autoencoder, as the pipeline can use it: one whose latents are divided by the scale factor alone.

    Raises ValueError if it is not that of the model's latents, or the pipeline cannot use it.
    """
    if not isinstance(vae, Autoencoder):
        vae = load_autoencoder(str(vae)) if isinstance(vae, str | Path) else Autoencoder(vae, "given")
    if "autoencoder" in facts and not facts["autoencoder"]:
        raise ValueError("export: the model was trained on pixels, which no autoencoder decodes; leave --vae out")
    if vae.latent_channels != config.in_channels:
        channels = f"{vae.latent_channels} latent channels, the model {config.in_channels}"
        raise ValueError(f"export: the autoencoder has {channels}")
    known = LatentSpace.of(facts["autoencoder"]) if facts.get("autoencoder") else vae.space
    if difference := known.difference(vae.space):
        raise ValueError(f"export: the model's latents are of another autoencoder, {known.spec}: {difference}")
    return folded(vae) if vae.space.is_channelwise else vae


@torch.no_grad()
def folded(autoencoder: Autoencoder) -> Autoencoder:
    """An autoencoder whose z is normalised by itself, so that pipelines which ignore mean and std decode as they should.

    Raises ValueError for one without the 1x1 convolutions that take over the means and standard deviations.
    """
    module = copy.deepcopy(autoencoder.module)
    if module.quant_conv is None or module.post_quant_conv is None:
        raise ValueError(f"export: {autoencoder.spec} has latents_mean or a shift_factor, which DiTPipeline ignores")
    mean, std = (
        part.flatten().expand(autoencoder.latent_channels) for part in autoencoder.space.statistics(torch.zeros(1))
    )
    after, before = module.post_quant_conv, module.quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[:, None, None]
    # The first half of the channels are z's means, the second its log-variances.
    before.bias -= torch.cat([mean, 2 * std.log()])
    scale = torch.cat([std, torch.ones_like(std)])
    before.weight /= scale[:, None, None, None]
    before.bias /= scale
    module.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)
    return Autoencoder(module, autoencoder.spec)


def autoencoder_facts(theirs: Mapping[str, Any], source: str, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Facts of the autoencoder in a pipeline's folder: its config's, and those known of it.

    Raises ValueError for an autoencoder of another kind.
    """
    if theirs.get("_class_name") != "AutoencoderKL" or not {"block_out_channels", "latent_channels"} <= theirs.keys():
        raise ValueError(f"{source}: its vae is a {theirs.get('_class_name')}; expected an AutoencoderKL")
    try:
        return {**LatentSpace.of_config(theirs, source).facts(), **(known or {}), "spec": source}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: its vae cannot be used ({error})") from error


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
        for last, file in enumerate((f"{WEIGHTS}.safetensors", f"{WEIGHTS}.fp16.safetensors", f"{WEIGHTS}.bin")):
            try:
                download(name, f"transformer/{file}")
                break
            except EntryNotFoundError:
                if last == 2:
                    raise
    except (OSError, ValueError) as error:
        here = f"{name}: no such file or folder here, and not available from the Hugging Face hub"
        raise OSError(f"{here} ({' '.join(str(error).split())[:200]}); check name and network") from error
    return root

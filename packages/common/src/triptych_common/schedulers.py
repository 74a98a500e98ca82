"""Schedulers of the diffusers library, by name: every one that can run a discrete process with given betas."""

import inspect
from typing import Any

import torch

from triptych_common.diffusion import GaussianDiffusion

# Arguments of schedulers for another process, or whose noise depends on the batch.
_FOREIGN = {"snr_shift_scale", "noise_sampler_seed"}
_FOR_DISTILLED_MODELS = ("LCMScheduler", "TCDScheduler")


def available() -> list[str]:
    """Names of the installed schedulers that `make_scheduler` supports.

    Raises ValueError if diffusers is not installed.
    """
    library = _library()
    names = [name for name in dir(library) if name.endswith("Scheduler")]
    return [name for name in names if _fits(name, getattr(library, name, None))]


def find(name: str) -> str:
    """The class name of the scheduler that `name` refers to: the name itself, or its beginning in any case ("unipc").

    Raises ValueError if no scheduler or several match, or if diffusers is not installed.
    """
    library = _library()
    # Full names first: listing every scheduler imports all of their modules.
    if name.endswith("Scheduler") and _fits(name, getattr(library, name, None)):
        return name
    names = available()
    matches = [each for each in names if each.lower().startswith(name.lower())]
    exact = [each for each in matches if each.lower() in (name.lower(), f"{name}scheduler".lower())]
    if len(exact or matches) != 1 or not name:
        choices = f"one of diffusers' {', '.join(matches or names)}, or a beginning that only one of them has"
        raise ValueError(f"sampler {name!r}: expected ddpm, ddim, or {choices}")
    return (exact or matches)[0]


def make_scheduler(
    name: str, diffusion: GaussianDiffusion, num_inference_steps: int, *, device: torch.device | str = "cpu"
) -> Any:
    """A diffusers scheduler with the betas of `diffusion` (not respaced), set to `num_inference_steps`.

    Sampling begins at the noisiest step, as x_T requires. So a scheduler whose default is "leading" timesteps, which omit
    that step, gets "trailing" ones; DDPM, which would add noise after the last of those, gets "linspace", as our own
    samplers do. Everything else keeps diffusers' defaults.

    Raises ValueError for an unknown name or a number of steps that the scheduler does not support.
    """
    name, total = find(name), len(diffusion.schedule)
    if not 1 <= num_inference_steps <= total:
        raise ValueError(f"num_inference_steps {num_inference_steps}: expected 1..{total}")
    scheduler_class = getattr(_library(), name)
    parameters = inspect.signature(scheduler_class.__init__).parameters
    wanted: dict[str, Any] = {
        "num_train_timesteps": total,
        "trained_betas": diffusion.schedule.betas.tolist(),
        "prediction_type": "epsilon",
        "clip_sample": False,  # `samplers.diffusers_steps` clips for every scheduler
        "set_alpha_to_one": True,
        "lower_order_final": True,  # the default of all schedulers but one, which warns without it
    }
    if is_ddpm(scheduler_class):
        wanted |= {"variance_type": diffusion.variance, "timestep_spacing": "linspace"}
    elif "timestep_spacing" in parameters and parameters["timestep_spacing"].default == "leading":
        wanted["timestep_spacing"] = "trailing"
    scheduler = scheduler_class(**{key: value for key, value in wanted.items() if key in parameters})
    try:
        scheduler.set_timesteps(num_inference_steps, device=device)
    except (ValueError, IndexError) as error:
        raise ValueError(f"num_inference_steps {num_inference_steps}: {name} cannot ({error}); use more") from error
    begins = float(scheduler.timesteps.max())
    if not begins >= total / 2:  # one "linspace" timestep is 0, and with two steps some schedulers return NaN
        raise ValueError(
            f"num_inference_steps {num_inference_steps}: {name} would begin at timestep {begins:g}, not at noise; use more"
        )
    return scheduler


def _library() -> Any:
    try:
        from diffusers import schedulers
    except ImportError as error:
        raise ValueError(
            "samplers other than ddpm and ddim need diffusers: pip install 'triptych-common[schedulers]'"
        ) from error
    return schedulers


def _fits(name: str, scheduler: Any) -> bool:
    """Whether a member of diffusers.schedulers samples a discrete process with given betas from its noise alone."""
    if not inspect.isclass(scheduler) or "Inverse" in name or name in _FOR_DISTILLED_MODELS:
        return False
    parameters = inspect.signature(scheduler.__init__).parameters
    return {"trained_betas", "prediction_type"} <= parameters.keys() and not _FOREIGN & parameters.keys()


def is_ddpm(scheduler_class: type) -> bool:
    """Whether the scheduler is ancestral sampling, which can use a learned variance."""
    return scheduler_class.__name__.startswith("DDPM")

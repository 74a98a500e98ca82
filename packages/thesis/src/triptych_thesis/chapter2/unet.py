"""A U-Net of diffusers in DiT's place, of as many GFLOPs, trained on the same examples.  [thesis Figure 2.2, right]"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from triptych_common import randomness
from triptych_common.cli import echo
from triptych_common.images import to_uint8
from triptych_common.parallel import Execution, process_group
from triptych_common.randomness import SampleNoise
from triptych_common.samplers import final, sampling
from triptych_common.storage import checkpoint
from triptych_common.storage.model_file import ModelFormat
from triptych_common.storage.run import RunDirectory
from triptych_common.training import TrainState, open_run, training_steps
from triptych_dit.config import DiTConfig
from triptych_dit.flops import gflops
from triptych_dit.objective import Objective, open_training_data
from triptych_dit.sample import SampleConfig, draw_missing, drop_damaged, gather, identity, write_grid
from triptych_dit.sampling import decoded
from triptych_dit.settings import SamplerSettings
from triptych_dit.train import snapshot_path
from triptych_dit.train_config import TrainConfig
from triptych_dit.weights import FILE_NAME, TrainedModel, make_diffusion

GROUPS, SMALLEST = 2, 4
_FORMAT = ModelFormat(
    kinds=("U-Net",), file_name=FILE_NAME, expected="a trained U-Net", mismatch="not a U-Net's model file",
    made="delete it and repeat the command", absent="no finished model; repeat the command",
)  # fmt: skip


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net: a residual block at each resolution down to four pixels, attention at the lowest alone."""

    side: int
    in_channels: int
    out_channels: int
    num_embeddings: int  # classes, and the null label
    width: int

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each resolution: the width, then twice it."""
        levels = max(2, (self.side // SMALLEST).bit_length())
        return (self.width,) + (2 * self.width,) * (levels - 1)


class UNet(nn.Module):
    """`model(x, t, y)` as DiT's: noise, then variance."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        rest = len(config.channels) - 1
        self.network = _import_unet()(
            sample_size=config.side, in_channels=config.in_channels, out_channels=config.out_channels,
            block_out_channels=config.channels, layers_per_block=1, norm_num_groups=GROUPS,
            down_block_types=("DownBlock2D",) * rest + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * rest,
            attention_head_dim=2 * config.width,  # the lowest resolution's channels: one head
            num_class_embeds=config.num_embeddings,
        )  # fmt: skip

    def forward(
        self, x: Float[Tensor, "batch channels height width"], t: Int[Tensor, " batch"], y: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        return self.network(x, t, class_labels=y).sample


@lru_cache(maxsize=8)
def matched(dit: DiTConfig) -> UNetConfig:
    """The U-Net for the same inputs and classes whose cost is nearest to a DiT's.

    Raises ValueError for inputs that are not square, and ImportError without diffusers.
    """
    height, width = dit.input_size
    if height != width or height % SMALLEST:
        raise ValueError(f"input_size {height}x{width}: the U-Net takes squares with sides of 4, 8, 16 or more")
    rows = dit.num_classes + (dit.null_label is not None)
    candidates = [UNetConfig(height, dit.in_channels, dit.out_channels, rows, GROUPS * k) for k in range(1, 257)]
    target = gflops(dit)
    # The cost rises with the width: the first candidate that costs more, and the one before it, are on either side.
    above = min(max(bisect_right(candidates, target, key=unet_gflops), 1), len(candidates) - 1)
    return min(candidates[above - 1 : above + 1], key=lambda config: abs(unet_gflops(config) - target))


def unet_gflops(config: UNetConfig) -> float:
    """GFLOPs of one forward pass on one input, a multiply-accumulate as one flop, by torch's counter, which counts two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = UNet(config).eval()
        x, one = torch.empty(1, config.in_channels, config.side, config.side), torch.zeros(1, dtype=torch.long)
        # Fused attention is opaque to the counter: the plain form has its two products.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(x, one, one)
    return counter.get_total_flops() / 2 / 1e9


def train_unet(config: TrainConfig) -> None:
    """Train the U-Net matched to `config.model` on exactly the examples, timesteps and noise that the DiT would see, or resume.

    Raises as `triptych_dit.train.train` does.
    """
    training_data = open_training_data(config.data, config.model)
    shape = matched(config.model)
    facts = {"data": training_data.identity, "unet": asdict(shape)}
    with process_group(config.device) as ranks, open_run(config, ranks, facts) as run:
        training_data.verify(ranks)
        with torch.random.fork_rng(devices=[]):
            # diffusers initialises from torch's global generator, which other code may have used.
            torch.manual_seed(randomness.generator(config.seed, "init").initial_seed())
            model = UNet(shape)
        state = TrainState(
            model.to(config.dtype),
            partial(torch.optim.AdamW, lr=config.lr, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay),
            ranks,
            **config.state_options() | {"execution": Execution(precision=config.arithmetic)},
        )
        objective = Objective(config, training_data)

        def keep(state: TrainState) -> None:
            for count in config.snapshots:
                if state.samples_seen - config.batch_size < count <= state.samples_seen:
                    _write(snapshot_path(run.path, count), shape, state, training_data.facts)

        for batch in training_steps(config, state, run, on_step=keep):
            losses = objective.loss(state.parallel_model, objective.draw(batch.counters), ranks.device)
            losses.total.mean().backward()
            state.update(batch, {"loss": losses.total.mean(), "mse": losses.mse.mean(), "vb": losses.vb.mean()})
        _write(run.path / FILE_NAME, shape, state, training_data.facts)
        echo(f"model: {run.path / FILE_NAME}")


def _write(path: Path, config: UNetConfig, state: TrainState, facts: dict[str, Any]) -> None:
    if state.ranks.is_main:
        _FORMAT.write(path, state.averaged(), asdict(config), facts)


def load_unet(path: Path) -> TrainedModel:
    """Read a model file of `train_unet`, onto the CPU in evaluation mode. Raises ValueError for a file of another kind."""
    return _FORMAT.read(path, _build)


def _build(tensors: dict[str, Tensor], facts: dict[str, Any]) -> TrainedModel:
    model: Any = UNet(UNetConfig(**facts["config"]))
    model.load_state_dict(tensors)
    learns_variance = model.config.out_channels == 2 * model.config.in_channels
    diffusion = make_diffusion(DiTConfig(learn_sigma=learns_variance), "noise")
    return TrainedModel(model.requires_grad_(False).eval(), diffusion, facts)


def sample_unet_file(config: SampleConfig) -> None:
    """Write a file of samples of a U-Net, or what is missing of it, as `triptych_dit.sample.sample` does of a DiT."""
    trained = load_unet(Path(config.checkpoint))
    unet: Any = trained.model
    classes = unet.config.num_embeddings - 1
    labels = torch.arange(config.num_samples) % classes
    weights = checkpoint.digest(unet.state_dict())
    request = identity(config, trained) | {"num_samples": config.num_samples, "model_sha256": weights}
    with process_group(config.device) as ranks, RunDirectory(config.out, request, is_main=ranks.is_main):
        unet.to(ranks.device)

        def draw(batch: range, step: Callable[[], None]) -> UInt8[Tensor, "batch channels height width"]:
            some = labels[batch.start : batch.stop]
            return sample_unet(trained, some, config, seed=config.seed, first_index=batch.start, vae=config.vae)

        drop_damaged(config.out / "samples.npz")
        if not (config.out / "samples.npz").exists():
            draw_missing(config, draw, 1, ranks)
        gather(config, labels)
        write_grid(config.out, classes)


@torch.inference_mode()
def sample_unet(
    trained: TrainedModel, labels: Int[Tensor, " batch"], settings: SamplerSettings, *, seed: int, first_index: int = 0,
    vae: str | None = None,
) -> UInt8[Tensor, "batch channels height width"]:  # fmt: skip
    """Samples without guidance, by DDPM or DDIM, from the noise that a DiT would start with.

    Raises ValueError for guidance or another sampler.
    """
    if settings.guidance_scale != 1 or not settings.is_own:
        raise ValueError(f"sampler {settings.sampler}: the U-Net is sampled by ddpm or ddim, without guidance")
    unet: Any = trained.model
    config, device = unet.config, next(unet.parameters()).device
    indices = range(first_index, first_index + len(labels))
    noise = SampleNoise(seed, indices, (config.in_channels, config.side, config.side), device=device)
    # Pixels lie in [-1, 1], and predictions of them are clipped; latents have no such range.
    clip = trained.facts.get("autoencoder") is None
    steps = sampling(settings, lambda x, t: unet(x, t, labels.to(device)), trained.diffusion, noise, clip_x_0=clip)
    x = final(steps)
    return to_uint8(decoded(trained, x, vae=vae)).cpu()


def _import_unet() -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError("experiment unet needs a package: pip install 'triptych-dit[latents]'") from error
    return UNet2DModel

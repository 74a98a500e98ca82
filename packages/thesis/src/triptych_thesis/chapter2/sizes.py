"""How large a study of chapter 2 is: sizes only, the code is the same."""

from dataclasses import dataclass, field, replace
from typing import get_args

from triptych_dit.autoencoder.config import AUTOENCODER_PRESETS, AutoencoderTrainConfig
from triptych_dit.config import PRESETS, BlockDesign, DiTConfig
from triptych_dit.settings import SamplerSettings
from triptych_dit.train_config import TRAIN_PRESETS, TrainConfig


@dataclass(frozen=True)
class Model:
    """A training run of the study: a DiT of the grid, perhaps of another block design or seed, or a U-Net beside it."""

    name: str  # of the grid, such as "L/2"
    design: BlockDesign = "adaln_zero"
    seed: int = 0  # counted from the study's own
    unet: bool = False  # the U-Net of as many GFLOPs

    @property
    def title(self) -> str:
        design = "" if self.design == "adaln_zero" else f" {self.design.replace('_', '-')}"
        return f"{'U-Net like ' if self.unet else ''}{self.name}{design}{f', seed +{self.seed}' if self.seed else ''}"

    @property
    def folder(self) -> str:
        return self.title.replace("/", "-").replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Size:
    """What is trained, on how much, and how it is sampled and scored."""

    data: str
    base: TrainConfig  # what all training runs have in common
    models: dict[str, DiTConfig]  # by name, "SIZE/PATCH"
    more: dict[str, DiTConfig]  # those that --all adds
    main: str  # the model of the gallery, guidance and samplers
    main_images: int  # it is trained on, in all
    designs: str
    unet: str
    repeated: tuple[str, ...]  # models trained with a second seed, for the noise of seeds
    compute: tuple[str, ...]
    autoencoder: AutoencoderTrainConfig | None = None
    stages: tuple[float, ...] = (0.25, 0.5, 1.0)  # shares of base.total_images at which quality is measured
    samples: int = 500
    sampler: SamplerSettings = field(default_factory=lambda: SamplerSettings("ddpm", 20))
    gallery_samples: int = 1000
    gallery_steps: int = 30
    compute_samples: int = 300
    compute_steps: tuple[int, ...] = (8, 32, 128)
    guidance_samples: int = 400
    guidance_scales: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0)
    guidance_scale: float = 1.5  # fixed beforehand: the thesis's cfg
    samplers: tuple[str, ...] = ("ddpm", "ddim", "unipc")
    sampler_steps: tuple[int, ...] = (5, 10, 25)
    repeats: int = 100  # of the bootstrap
    kept: tuple[int, ...] = ()  # counts at which guided samples of the main model are scored on its way
    guidance_channels: int | None = None  # beside all; by default all but one
    reference: str | None = None  # an ADM reference file: photographs, in latents made beforehand
    side: int = 32  # of the images
    left_out: tuple[str, ...] = ()  # experiments that have no sense at this size

    def __post_init__(self) -> None:
        for name, images in (("base.total_images", self.base.total_images), ("main_images", self.main_images)):
            if images % self.base.batch_size:
                raise ValueError(f"{name} {images}: expected whole batches of {self.base.batch_size}, as stages are")
        for name, shape in self.grid(True).items():
            if not _passes_noise(shape):
                width = f"expected fewer than its width {shape.hidden_size}"
                raise ValueError(f"{name}: {_values(shape)} values a patch, {width}")

    def grid(self, everything: bool) -> dict[str, DiTConfig]:
        return self.models | self.more if everything else self.models

    def count(self, stage: float) -> int:
        """Images seen at a stage, whole batches."""
        return max(1, round(stage * self.base.total_images / self.base.batch_size)) * self.base.batch_size

    def images(self, model: Model) -> int:
        """Images that a run trains on."""
        return self.main_images if model == Model(self.main) else self.base.total_images

    def shape(self, model: Model) -> DiTConfig:
        return replace(self.grid(True)[model.name], block_design=model.design)

    def others(self) -> list[Model]:
        """Models of the three other block designs."""
        return [Model(self.designs, design) for design in get_args(BlockDesign) if design != "adaln_zero"]


def _grid(base: DiTConfig, widths: dict[str, tuple[int, int, int]], patches: tuple[int, ...]) -> dict[str, DiTConfig]:
    """Every width with every patch whose noise it can pass on."""
    shapes = {
        f"{name}/{patch}": replace(base, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
        for name, (depth, width, heads) in widths.items()
        for patch in patches
    }
    return {name: shape for name, shape in shapes.items() if _passes_noise(shape)}


def _values(shape: DiTConfig) -> int:
    """Numbers of a patch."""
    return shape.patch_size**2 * shape.in_channels


def _passes_noise(shape: DiTConfig) -> bool:
    # As in the thesis: the noise that a model predicts could not pass through one narrower than its patches hold values, whose
    # samples then explode.
    return _values(shape) < shape.hidden_size


_LATENTS = DiTConfig((8, 8), 4, num_classes=10)  # of 32 x 32 pixels: digits with a margin of two pixels on every side
_PIXELS = DiTConfig((32, 32), 1, num_classes=10)
_WIDTHS = {"S": (2, 32, 1), "B": (3, 48, 2), "L": (4, 80, 2)}  # depth, width, heads
_WIDER = {"XL": (6, 112, 4)}
# A constant rate, as in the thesis: a run that goes on is the longer run, so stages are runs of their own.
_BASE = replace(
    TRAIN_PRESETS["digits"], total_images=61_440, batch_size=64, lr=5e-3, lr_schedule="constant", warmup_images=6_400,
    snapshots=(), checkpoint_every=250,
)  # fmt: skip
_LAPTOP = Size(
    "mnist5k",
    _BASE,
    _grid(_LATENTS, _WIDTHS, (4, 2, 1)),
    _grid(_LATENTS, _WIDER, (4, 2, 1)),
    main="L/1", main_images=153_600, designs="B/2", unet="L/2", repeated=("S/2", "S/1", "B/2", "L/4"),
    compute=("S/1", "B/1", "L/1"),
    autoencoder=replace(AUTOENCODER_PRESETS["digits"], total_images=9_600),
)  # fmt: skip
_SMOKE = replace(
    _LAPTOP,
    base=replace(_BASE, total_images=1_280, warmup_images=640, ema_half_life_images=640, log_every=5, checkpoint_every=10),
    models=_grid(_LATENTS, {"S": (1, 24, 1), "B": (2, 32, 1)}, (2, 1)),
    more=_grid(_LATENTS, {"L": (2, 80, 1)}, (4,)),
    main="B/2", main_images=6_400, designs="S/2", unet="B/2", repeated=("S/2",), compute=("S/2", "B/2"),
    autoencoder=AUTOENCODER_PRESETS["digits-smoke"],
    stages=(0.5, 1.0), samples=50, sampler=SamplerSettings("ddpm", 5), repeats=10,
    gallery_samples=100, gallery_steps=10,
    compute_samples=20, compute_steps=(2, 16),
    guidance_samples=50, guidance_scales=(1.0, 1.5),
    sampler_steps=(2, 5),
)  # fmt: skip


def _of_pixels(size: Size) -> Size:
    """The same study of pixels: patches of four times the side, so as many tokens, of models wide enough for them."""

    def pixels(grid: dict[str, DiTConfig]) -> dict[str, DiTConfig]:
        shapes = {}
        for name, latents in grid.items():
            shape = replace(latents, input_size=(32, 32), in_channels=1, patch_size=4 * latents.patch_size)
            if _passes_noise(shape):
                shapes[f"{name.split('/')[0]}/{shape.patch_size}"] = shape
        return shapes

    models = pixels(size.models)
    finest = list(dict.fromkeys(f"{name.split('/')[0]}/4" for name in models))
    return replace(
        size, models=models, more=pixels(size.more), autoencoder=None,
        main=finest[-1], designs=finest[-2], repeated=tuple(finest[:-1]), compute=tuple(finest),
        unet=finest[-1],  # a smaller U-Net of 32 x 32 pixels would be hardly one
    )  # fmt: skip


_GPU_WIDTHS = {"S": (6, 128, 2), "B": (8, 192, 3), "L": (12, 256, 4)}
_GPU = replace(
    _LAPTOP,
    data="mnist",
    base=replace(
        _BASE, total_images=1_024_000, batch_size=256, lr=5e-4, warmup_images=50_000, ema_half_life_images=200_000,
        precision="bf16", checkpoint_every=1_000,
    ),
    models=_grid(_PIXELS, _GPU_WIDTHS, (8, 4, 2)),
    more=_grid(_PIXELS, {"XL": (12, 384, 6)}, (8, 4, 2)),
    main="L/2", main_images=4_096_000, designs="B/4", unet="B/4", repeated=("S/8", "S/4", "B/8", "B/4"),
    compute=("S/2", "B/2", "L/2"),
    autoencoder=None,
    stages=(0.1, 0.2, 0.4, 0.7, 1.0), samples=5_000, sampler=SamplerSettings("ddpm", 100),
    gallery_samples=10_000, gallery_steps=250,
    compute_samples=2_000, compute_steps=(16, 32, 64, 128, 256, 1000),
    guidance_samples=5_000,
    samplers=("ddpm", "ddim", "unipc", "dpmsolvermultistep"), sampler_steps=(5, 10, 25, 50),
)  # fmt: skip

_BATCH = 256
_PAPER_GRID = [f"{width}/{patch}" for width in ("S", "B", "L", "XL") for patch in (8, 4, 2)]
_PAPER = Size(  # thesis 2.4 and 2.5
    "latents/imagenet-256",
    replace(TRAIN_PRESETS["DiT-XL/2"], total_images=400_000 * _BATCH, precision="bf16"),
    {name: PRESETS[f"DiT-{name}"] for name in _PAPER_GRID},
    {},
    main="XL/2", main_images=7_000_000 * _BATCH, designs="XL/2", unet="B/4", repeated=(), compute=tuple(_PAPER_GRID),
    stages=(0.125, 0.25, 0.5, 0.75, 1.0), samples=50_000, sampler=SamplerSettings("ddpm", 250),
    compute_samples=10_000, compute_steps=(16, 32, 64, 128, 256, 1000),
    guidance_samples=50_000, guidance_scales=(1.0, 1.25, 1.5), guidance_channels=3, kept=(2_350_000 * _BATCH,),
    sampler_steps=(16, 32, 64, 128, 250),
    reference="VIRTUAL_imagenet256_labeled.npz", side=256,
    left_out=("gallery", "unet"),  # whose instruments read digits; whose U-Nets are others' published ones
)  # fmt: skip
_PAPER_512 = replace(  # Table 2.3; precision and recall against the 1,000 real images of the published reference file
    _PAPER,
    data="latents/imagenet-512",
    base=replace(TRAIN_PRESETS["DiT-XL/2@512"], precision="bf16"),
    models={"XL/2": PRESETS["DiT-XL/2@512"]},
    main_images=3_000_000 * _BATCH, stages=(1.0,), kept=(), reference="VIRTUAL_imagenet512.npz", side=512,
    left_out=("gallery", "block-designs", "scaling", "compute", "visual-scaling", "unet", "samplers"),
)  # fmt: skip

SIZES: dict[str, Size] = {
    "smoke": _SMOKE,
    "smoke-pixels": _of_pixels(_SMOKE),
    "laptop": _LAPTOP,
    "laptop-pixels": _of_pixels(_LAPTOP),
    "gpu": _GPU,
    "paper": _PAPER,
    "paper-512": _PAPER_512,
}

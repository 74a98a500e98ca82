"""DiTConfig and its presets: one row a model."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

from triptych_common.fields import Checked, Ge, Gt, Interval

BlockDesign = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
BLOCK_DESIGNS: tuple[str, ...] = get_args(BlockDesign)


@dataclass(frozen=True)
class DiTConfig(Checked):
    """Shape of a diffusion transformer.  [thesis 2.3.2, Table 2.1]"""

    input_size: tuple[int, int] = (32, 32)
    """height and width of the model's input: latents, or pixels"""
    in_channels: Annotated[int, Ge(1)] = 4
    """channels of the input; 4 for Stable Diffusion's latents, 1 for gray pixels"""
    patch_size: Annotated[int, Ge(1)] = 2
    """side of a square patch; one patch is one token"""
    hidden_size: Annotated[int, Ge(1)] = 1152
    """width of a token"""
    depth: Annotated[int, Ge(1)] = 28
    """number of transformer blocks"""
    num_heads: Annotated[int, Ge(1)] = 16
    """attention heads; hidden_size must be a multiple"""
    mlp_ratio: float = 4.0
    """hidden width of the feed-forward over hidden_size"""
    num_classes: Annotated[int, Ge(0, "at least 1, or 0 for an unconditional model")] = 1000
    """classes 0 .. num_classes-1; the null label of guidance is num_classes itself; 0: unconditional"""
    class_dropout_prob: Annotated[float, Interval(ge=0, lt=1, wanted="0 <= p < 1")] = 0.1
    """share of training samples whose label becomes the null label; 0: no null label, no guidance"""
    learn_sigma: bool = True
    """predict the variance too, in as many further output channels"""
    block_design: BlockDesign = "adaln_zero"
    """how blocks see timestep and class; the best published one is adaln_zero"""
    timestep_frequency_shift: Annotated[int, Interval(ge=0, le=1, wanted="0 or 1")] = 0
    """frequencies of the timestep run down to 10000^-1 with 1, as in diffusers, or stop short of it with 0, as released"""
    mlp_norm_eps: Annotated[float, Gt(0, "a number above 0, such as 1e-6")] = 1e-6
    """epsilon of the last LayerNorm of a block; 1e-5 is the default of diffusers"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(side < 1 or side % self.patch_size for side in self.input_size):
            size = f"{self.input_size[0]}x{self.input_size[1]}"
            raise ValueError(f"input_size {size} is not a multiple of patch_size {self.patch_size}; change one of them")
        if self.hidden_size % 4 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}: expected a multiple of 4 and of num_heads ({self.num_heads})"
            )
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio}: expected a number above 0, such as 4")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def null_label(self) -> int | None:
        """The label that stands for 'no class', or None for a model trained without label dropout."""
        return self.num_classes if self.num_classes and self.class_dropout_prob > 0 else None

    @property
    def condition_tokens(self) -> int:
        """Embeddings a block is conditioned on: timestep, and class where there is one."""
        return 2 if self.num_classes else 1


@dataclass(frozen=True)
class CheckpointOptions:
    """What the files of other programs leave open about a model."""

    vae: str | None = None
    """autoencoder of a model of latents, a folder or a hub name: where it is now, or which one, if the file does not say"""
    predict: Literal["noise", "sample"] | None = None
    """what the model predicts, if its file does not say; by default noise, as published"""
    weights: Literal["ema", "model"] | None = None
    """which weights of a training checkpoint; the average where there is one"""
    num_heads: int | None = None
    """attention heads, for widths that were not published"""
    num_classes: int | None = None
    """classes, where the label table leaves them open"""
    input_size: int | None = None
    """side of the model's inputs, for files without a position embedding"""

    def loading(self) -> dict[str, Any]:
        """Keyword arguments of `load_any`."""
        return {name: getattr(self, name) for name in CheckpointOptions.__dataclass_fields__}


_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads
_DESIGNS: dict[str, BlockDesign] = {
    "": "adaln_zero", "-adaln": "adaln", "-cross-attention": "cross_attention", "-in-context": "in_context",
}  # fmt: skip
_DIGITS = DiTConfig((28, 28), 1, patch_size=4, depth=4, hidden_size=80, num_heads=2, num_classes=10)

PRESETS: dict[str, DiTConfig] = (
    {  # thesis Table 2.1, on latents of 256 x 256 or 512 x 512 images, one channel grid of 1/8 the side
        f"DiT-{size}/{patch}{design}{resolution}": DiTConfig(
            (side, side),
            patch_size=patch,
            depth=depth,
            hidden_size=width,
            num_heads=heads,
            block_design=_DESIGNS[design],
        )
        for size, (depth, width, heads) in _SIZES.items()
        for patch in (2, 4, 8)
        for design in _DESIGNS
        for resolution, side in (("", 32), ("@512", 64))
    }
    | {  # digits of 28 x 28, in pixels and in latents of 7 x 7
        "digits": _DIGITS,
        "digits-tiny": replace(_DIGITS, depth=2, hidden_size=32),
        "digits-latent": replace(_DIGITS, input_size=(7, 7), in_channels=4, patch_size=1),
        "digits-latent-tiny": replace(_DIGITS, input_size=(7, 7), in_channels=4, patch_size=1, depth=2, hidden_size=32),
    }
)

"""DiTConfig and its presets: one row a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a diffusion transformer.  [thesis 2.3.2, Table 2.1]"""

    input_size: tuple[int, int] = (32, 32)
    """height and width of the model's input: latents, or pixels"""
    in_channels: int = 4
    """channels of the input; 4 for Stable Diffusion's latents, 1 for gray pixels"""
    patch_size: int = 2
    """side of a square patch; one patch is one token"""
    hidden_size: int = 1152
    """width of a token"""
    depth: int = 28
    """number of transformer blocks"""
    num_heads: int = 16
    """attention heads; hidden_size must be a multiple"""
    mlp_ratio: float = 4.0
    """hidden width of the feed-forward over hidden_size"""
    num_classes: int = 1000
    """classes 0 .. num_classes-1; the null label of guidance is num_classes itself"""
    class_dropout_prob: float = 0.1
    """share of training samples whose label becomes the null label; 0: no null label, no guidance"""
    learn_sigma: bool = True
    """predict the variance too, in as many further output channels"""

    def __post_init__(self) -> None:
        for name in ("in_channels", "patch_size", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if any(side < 1 or side % self.patch_size for side in self.input_size):
            raise ValueError(
                f"input_size {self.input_size[0]}x{self.input_size[1]} is not a multiple of patch_size "
                f"{self.patch_size}; change one of them"
            )
        if self.hidden_size % 4 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}: expected a multiple of 4 and of num_heads ({self.num_heads})"
            )
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio}: expected a number above 0, such as 4")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob {self.class_dropout_prob}: expected 0 <= p < 1")

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
        return self.num_classes if self.class_dropout_prob > 0 else None


_SIZES = {  # thesis Table 2.1: depth, width, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}

PRESETS: dict[str, DiTConfig] = {
    f"DiT-{size}/{patch}{suffix}": DiTConfig(
        input_size=(side, side), patch_size=patch, depth=depth, hidden_size=width, num_heads=heads
    )
    for size, (depth, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
    for suffix, side in (("", 32), ("@512", 64))
} | {  # pixel space, digits of 28 x 28
    "digits": DiTConfig((28, 28), 1, patch_size=4, depth=4, hidden_size=80, num_heads=2, num_classes=10),
    "digits-tiny": DiTConfig((28, 28), 1, patch_size=4, depth=2, hidden_size=32, num_heads=2, num_classes=10),
}

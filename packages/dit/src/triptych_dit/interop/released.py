"""Files of the released DiT (facebookresearch/DiT): a bare state dict, or a training checkpoint {model, ema, opt, args},
of that code, its descendants, or anybody's own loop over its model.

Our modules have the released names, so nothing is renamed; a model's shape follows from its tensors.
"""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triptych_common.cli import echo
from triptych_common.data.datasets import data_root
from triptych_common.data.files import fetch
from triptych_common.storage import checkpoint, foreign
from triptych_common.storage.bounded import Bounded
from triptych_common.storage.files import check
from triptych_common.storage.model_file import refuse_non_finite

from triptych_dit.config import PRESETS, DiTConfig
from triptych_dit.flops import parameter_count
from triptych_dit.model import DiT, sincos_position_embedding
from triptych_dit.weights import Facts, recorded

TABLE = "y_embedder.embedding_table.weight"
FACTS = "triptych"  # entry of the facts in exported files
TIMESTEP_BIAS = "t_embedder.mlp.2.bias"
LANDMARKS = ("x_embedder.proj.weight", TABLE, "blocks.0.mlp.fc1.weight", "final_layer.linear.weight")
_HEADS = {config.hidden_size: config.num_heads for name, config in PRESETS.items() if name.startswith("DiT-")}
_URL = "https://dl.fbaipublicfiles.com/DiT/models/"


class Published(NamedTuple):
    """One file that the authors offer."""

    file: str
    url: str
    config: DiTConfig
    size: int | None = None  # bytes, where known
    sha256: str | None = None


# The authors publish no hash: these are what public projects pin for the first file; nobody is known to pin the second's.
_XL_2_256 = Published(
    "DiT-XL-2-256x256.pt", f"{_URL}DiT-XL-2-256x256.pt", PRESETS["DiT-XL/2"], 2_700_611_775,
    "9ec1876e4c03471bca126663a30e2d1b20610b6d2f87850a39a36f25cc685521",
)  # fmt: skip
_XL_2_512 = Published("DiT-XL-2-512x512.pt", f"{_URL}DiT-XL-2-512x512.pt", PRESETS["DiT-XL/2@512"])
PUBLISHED = {
    "DiT-XL/2": _XL_2_256, "DiT-XL/2@256": _XL_2_256, _XL_2_256.file: _XL_2_256,
    "DiT-XL/2@512": _XL_2_512, _XL_2_512.file: _XL_2_512,
}  # fmt: skip


def load_released(source: str | Path, **options: Any) -> DiT:
    """The model of `read_released`, without its facts."""
    return read_released(source, **options)[0]


def read_released(
    source: str | Path, *, weights: str | None = None, num_heads: int | None = None, num_classes: int | None = None,
    input_size: int | None = None,
) -> tuple[DiT, dict[str, Any]]:  # fmt: skip
    """Read a released or self-trained file of facebookresearch/DiT: float32, on the CPU, in evaluation mode, and its facts,
    which only `export_released` writes.

    source: a file (.pt, .ckpt or .safetensors), whatever wrapped its network, or a published name ("DiT-XL/2@256",
        "DiT-XL/2@512"), which is downloaded to `$TRIPTYCH_DATA/dit` once.
    weights: "ema" or "model" of a training checkpoint; by default "ema" if it has them.
    num_heads: number of attention heads; needed for widths that were not published.
    num_classes: by default that of the checkpoint's arguments, else one less than the label table has rows.
    input_size: side of the inputs of a file without a position embedding; by default that of its arguments, else 32.
    Raises FileNotFoundError if there is no such file, ValueError if it is not such a model.
    """
    path = Path(source).expanduser()
    if str(source) in PUBLISHED and not path.is_file():
        path = published_file(str(source))
    if "state" in foreign.metadata(path):
        raise ValueError(f"{path}: a model file of triptych's own, not a released one; read it with load_model")
    state, args, facts = _network(path, weights)
    _check_family(state, path, args)
    heads = num_heads or getattr(PRESETS.get(str(args.get("model"))), "num_heads", None)
    try:
        if "pos_embed" not in state:
            state["pos_embed"] = _computed_embedding(state, args, input_size)
            note = f"has no position embedding; computed for {state['pos_embed'].shape[1]} tokens, as --input-size sets"
            echo(f"{path}: {note}")
        argument, rows = args.get("num_classes"), len(state[TABLE])
        if num_classes is None:
            num_classes = argument if isinstance(argument, int) and rows - argument in (0, 1) else rows - 1
        config = infer_config(state, num_heads=heads, num_classes=num_classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not config.num_classes:
        fold_table(state)
    model = assembled(config, state, str(path))
    ours = sincos_position_embedding(*config.grid, config.hidden_size)
    gap = float((model.pos_embed[0] - ours).abs().max())
    if gap > 1e-6:
        echo(f"{path}: its position embedding is not the sine-cosine one (differs by up to {gap:.2g}); kept as it is")
    return model, facts


def published_file(name: str) -> Path:
    """The file of a published name, downloaded to `$TRIPTYCH_DATA/dit` once, checked by size and, if it is known, hash.

    Raises FileNotFoundError if it cannot be downloaded, ValueError for another file in its place.
    """
    entry = PUBLISHED[name]
    path = data_root() / "dit" / entry.file
    fetch(f"model {name}", entry.url, path, "put the file there, or pass the path of one")
    size, least = path.stat().st_size, 4 * parameter_count(entry.config)
    if not least < size < least + 2**20 or size != (entry.size or size):  # tensors, and at most a megabyte of names
        raise ValueError(f"{path}: {size:,} bytes, expected {entry.size or least:,}; delete the file and repeat")
    if entry.sha256 is not None and (found := checkpoint.file_digest(path)) != entry.sha256:
        raise ValueError(f"{path}: SHA-256 {found[:16]}, expected {entry.sha256[:16]}; delete the file and repeat")
    return path


def export_released(model: DiT, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a model's state dict, in float32, as the original code reads it: as the average of a training checkpoint.

    facts: of the model, for `read_released`; the original code knows nothing of them.
    A model without classes gets a label table of one row of zeros: pass label 0 there.
    Raises ValueError for a model that the original code cannot run, OSError if the file cannot be written.
    """
    config = model.config
    for name, wanted in (("block_design", "adaln_zero"), ("timestep_frequency_shift", 0), ("mlp_norm_eps", 1e-6)):
        if getattr(config, name) != wanted:
            raise ValueError(f"export: {name} {getattr(config, name)}: the released code knows only {wanted}")
    require_square(config, "the released code")
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if not config.num_classes:
        state[TABLE] = torch.zeros(1, config.hidden_size)
    foreign.write(path, {"ema": state, FACTS: {"predict": "noise", **recorded(facts or {})}})


def infer_config(state: Mapping[str, Tensor], *, num_heads: int | None, num_classes: int) -> DiTConfig:
    """The config of the model that a state dict of released names belongs to.

    Raises ValueError if the tensors do not determine it, or if num_classes does not fit the label table.
    """
    for name, axes in (("x_embedder.proj.weight", 4), ("pos_embed", 3), (TABLE, 2)):
        if state[name].ndim != axes:
            raise ValueError(f"{name} is {tuple(state[name].shape)}: expected {axes} axes")
    # The tensors determine everything but the number of heads and whether the label table ends with a null label.
    width, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    tokens, rows = state["pos_embed"].shape[1], len(state[TABLE])
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"pos_embed has {tokens} tokens, which is no square; the released code knows only squares")
    if num_heads is None and width not in _HEADS:
        published = ", ".join(map(str, sorted(_HEADS)))
        raise ValueError(f"hidden_size {width} is none of the published ({published}): pass num_heads")
    if rows - num_classes not in (0, 1):
        raise ValueError(
            f"num_classes {num_classes}: the label table has {rows} rows, which fits {rows - 1} (with a null label) or {rows}"
        )
    channels = len(state["final_layer.linear.weight"]) / patch**2
    if channels not in (in_channels, 2 * in_channels):
        raise ValueError(f"{channels:g} output channels for {in_channels} of input: expected as many, or twice as many")
    # The ratio must give the hidden width again when multiplied and truncated, however the division rounds.
    hidden = len(state["blocks.0.mlp.fc1.weight"])
    ratio = hidden / width
    return DiTConfig(
        input_size=(side * patch, side * patch),
        in_channels=in_channels,
        patch_size=patch,
        hidden_size=width,
        depth=1 + max(int(block[1]) for name in state if (block := re.match(r"blocks\.(\d+)\.", name))),
        num_heads=num_heads or _HEADS[width],
        mlp_ratio=ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
        num_classes=num_classes,
        class_dropout_prob=0.1 if rows > num_classes else 0.0,
        learn_sigma=channels != in_channels,
    )


def fold_table(state: dict[str, Tensor]) -> None:
    """Add the label table of a model without classes, all of whose rows are equal, to the timestep's bias."""
    # The condition is the sum of both embeddings, so a constant one can move into the other's bias.
    state[TIMESTEP_BIAS] = state[TIMESTEP_BIAS] + state.pop(TABLE)[-1]


def assembled(config: DiTConfig, state: Mapping[str, Tensor], source: str) -> DiT:
    """The model of a complete state dict: float32, frozen, in evaluation mode. Raises ValueError if it does not fit."""
    model = skeleton(config, state, source)
    check_keys(state, model.state_dict(), source)
    refuse_non_finite(state, source)
    owned = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in state.items()}
    model.load_state_dict(owned, assign=True)
    return model.requires_grad_(False).eval()


def skeleton(config: DiTConfig, state: Mapping[str, Tensor], source: str) -> DiT:
    """The model without values. Raises ValueError for a config of a model far larger than the state dict."""
    try:
        with Bounded(sum(tensor.nbytes for tensor in state.values())), torch.device("meta"):
            return DiT(config)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source}: config and weights are not of one model ({reason})") from error


def check_keys(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError, in one line, for names or shapes that differ."""
    shared = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    sides = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [f"{n} {tuple(found[n].shape)} for {tuple(expected[n].shape)}" for n in shared],
    }
    if any(sides.values()):
        listed = "; ".join(f"{side}: {_first(names)}" for side, names in sides.items() if names)
        raise ValueError(f"{source}: its tensors are not those of a DiT ({len(expected)} expected): {listed}")


def require_square(config: DiTConfig, whose: str) -> None:
    """Raise ValueError for a rectangular model."""
    height, width = config.input_size
    if height != width:
        raise ValueError(f"export: input_size {height}x{width}: {whose} knows only squares")


def _network(path: Path, weights: str | None) -> tuple[dict[str, Tensor], Mapping[str, Any], dict[str, Any]]:
    """The state dict of a file, the arguments of the released code's command line, and the facts of our export, if any."""
    if weights not in (None, "ema", "model"):
        raise ValueError(f"weights {weights!r}: expected 'ema' or 'model'")
    found = foreign.state_dict(path, holds=LANDMARKS, prefer="model" if weights == "model" else "ema")
    if weights and not found.place:
        raise ValueError(f"{path}: a bare state dict, with no choice of weights {weights!r}; leave the option out")
    if weights and found.is_average != (weights == "ema"):
        raise ValueError(f"{path}: has no weights {weights!r}, only {found.place}")
    args, facts = (found.content.get(name, {}) for name in ("args", FACTS))
    if facts:
        check(facts, Facts, source=f"{path}: {FACTS}", remedy="export it again")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return found.tensors, args if isinstance(args, Mapping) else {}, dict(facts)


def _computed_embedding(state: Mapping[str, Tensor], args: Mapping[str, Any], side: int | None) -> Tensor:
    """The position embedding that files of trained parameters alone lack."""
    (width, _, patch, _), pixels = state["x_embedder.proj.weight"].shape, args.get("image_size")
    if side is None:
        side = (
            pixels // 8 if isinstance(pixels, int) else 32
        )  # eight pixels a latent, as with the released code's autoencoder
    if not 0 < side < 1 << 12 or side % patch:
        raise ValueError(f"input_size {side}: expected a multiple of its patch size, {patch}")
    return sincos_position_embedding(side // patch, side // patch, width)[None]


_FAMILIES = {  # names that only they have
    r"transformer_blocks\.\d+\.norm1\.emb\.": (
        "the transformer of a diffusers DiT; pass the folder with its config.json, not the file"
    ),
    r"(down_blocks|up_blocks|unet)\.": "a UNet of diffusers",
    r"(model\.diffusion_model\.)?input_blocks\.": "a UNet (ADM, LDM or Stable Diffusion)",
    r"(encoder|decoder|quant_conv)\.": "an autoencoder, which belongs to --vae",
    r"(en_inblocks|sideblocks|mask_token|decoder_pos_embed)|.*rel_pos_bias": "an MDT",
    r"projectors\.": "a SiT trained with REPA",
    r".*\.mlp\.w12\.|feat_rope": "a LightningDiT",
    r"(in_blocks|mid_block|out_blocks)\.": "a U-ViT",
    r"y_embedder\.y_proj\.|caption_|t_block\.": "a PixArt, conditioned on text",
}


def _check_family(state: Mapping[str, Tensor], path: Path, args: Mapping[str, Any]) -> None:
    """Raise ValueError if it is not a released DiT, naming the model that it looks like."""
    looks = next((what for names, what in _FAMILIES.items() if any(re.match(names, key) for key in state)), None)
    if "path_type" in args or path.name.startswith("SiT"):  # its tensors are named and shaped as a DiT's
        looks = "a SiT, which predicts velocities"
    if looks:
        raise ValueError(f"{path}: looks like {looks}; expected a model of facebookresearch/DiT")
    missing = [name for name in LANDMARKS if name not in state]
    if missing:
        held = f"missing: {_first(missing)}; it holds: {_first(list(state)) or 'no tensors'}"
        raise ValueError(f"{path}: not a model of facebookresearch/DiT; {held}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")

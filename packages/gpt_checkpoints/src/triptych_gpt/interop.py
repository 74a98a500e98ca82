"""Checkpoints of the released G.pt models (wpeebles/G.pt): read into a `Gpt`, and written as the original code reads them.

A released file is a dict with the weights "G", their average "G_ema" and the optimiser's state. Names differ from ours, and
query, key and value are separate layers.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from triptych_common.storage import foreign
from triptych_common.storage.model_file import refuse_non_finite

from triptych_gpt.config import GptConfig
from triptych_gpt.model import Gpt
from triptych_gpt.presets import PRESETS
from triptych_gpt.settings import RELEASED
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.tokenizers import RAW_FREQUENCIES, RAW_OCTAVES, raw_frequencies, splits

_FREQUENCIES, _POSITIONS = "scalar_embedder.frequencies", "decoder.pos_emb"


def load_released(path: Path, preset: str | GptConfig) -> Gpt:
    """A released file as a Gpt, float32, frozen, on the CPU and in evaluation mode; the averaged weights if it has them.

    preset: a name in `RELEASED`, or the config of a model trained with the original code.
    Raises FileNotFoundError for an absent file, ValueError for one that is damaged, unsafe or of another model, naming the tensor.
    """
    if isinstance(preset, str) and preset not in RELEASED:
        raise ValueError(f"preset {preset!r}: expected one of {', '.join(RELEASED)}")
    config = PRESETS[preset] if isinstance(preset, str) else preset
    state = _state_dict(path)
    _check_kind(config)
    with torch.device("meta"):
        model = Gpt(config)
    wanted = model.state_dict()
    _check(state, {name: tuple(tensor.shape) for name, tensor in _as_released(model).items()}, path)
    refuse_non_finite(state, str(path))
    ours = {}
    for mine, names in _names(config):
        joined = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        ours[mine] = joined.reshape(wanted[mine].shape).to(torch.float32, copy=True).contiguous()
    model.load_state_dict(ours, assign=True)
    return model.requires_grad_(False).eval()


def config_of(
    path: Path, symmetry: PermutationSpec, *, num_heads: int | None = None, metric_factor: float = 1.0
) -> GptConfig:
    """The shape of a model trained with the original code on networks of this symmetry, from the tensors in its file.

    num_heads: not in the file; by default those of a released model of this width and depth.
    Raises FileNotFoundError for an absent file, ValueError for one that is damaged, unsafe, or of other networks.
    """
    state = _state_dict(path)
    width = state[_POSITIONS].shape[-1]
    blocks = {int(found[1]) for name in state if (found := re.match(r"decoder\.blocks\.(\d+)\.", name))}
    pattern = re.compile(r"decoder\.output_parameter_projections\.(\d+)\.0\.weight")
    tokens = {int(found[1]): len(x) for name, x in state.items() if (found := pattern.fullmatch(name))}
    sizes, layout = [tokens[i] for i in sorted(tokens)], symmetry.layout
    if num_heads is None:
        known = [
            c.num_heads for n, c in PRESETS.items() if n in RELEASED and (c.width, c.depth) == (width, len(blocks))
        ]
        if len(set(known)) != 1:
            problem = f"width {width} and {len(blocks)} blocks do not tell the number of attention heads"
            raise ValueError(f"{path}: {problem}; give --num-heads")
        num_heads = known[0]
    chunk = max(sizes, default=0)
    shapes = [("layer", None), ("chunk", chunk)] if chunk else []
    for tokenizer, chunk_size in shapes:
        config = GptConfig(
            symmetry, tokenizer, chunk_size, width, len(blocks), num_heads, scalars="raw", metric_factor=metric_factor
        )
        if splits(config) == sizes:
            return config
    raise ValueError(
        f"{path}: tokens of {', '.join(map(str, sizes[:8]))}{', ...' if len(sizes) > 8 else ''} parameters ({sum(sizes):,}), the "
        f"task's networks have {', '.join(str(s.stop - s.start) for s in list(layout.spans.values())[:8])} ({layout.size:,}); "
        "give the --task that it was trained on"
    )


def _state_dict(path: Path) -> dict[str, Tensor]:
    state = foreign.state_dict(path, holds=[_POSITIONS]).tensors
    if _POSITIONS not in state:
        expected = f"expected a dict with G_ema or G, holding {_POSITIONS}"
        raise ValueError(f"{path}: not a checkpoint of wpeebles/G.pt; {expected}")
    return state


def export_released(model: Gpt) -> dict[str, Tensor]:
    """The model's state dict, float32, under the original code's names; to be saved as {"G_ema": it}.

    Raises ValueError for a model that the original code does not have: neuron tokens, or normalised scalars.
    """
    _check_kind(model.config)
    theirs = {name: tensor.detach().float().cpu().contiguous() for name, tensor in _as_released(model).items()}
    return {_FREQUENCIES: raw_frequencies(), **theirs}


def _as_released(model: Gpt) -> dict[str, Tensor]:
    """The model's tensors under the original code's names, and with its shapes."""
    ours, theirs = model.state_dict(), dict[str, Tensor]()
    for mine, names in _names(model.config):
        parts = [ours[mine][None]] if mine == "positions" else ours[mine].chunk(len(names))
        theirs |= dict(zip(names, parts, strict=True))
    return theirs


def _check_kind(config: GptConfig) -> None:
    for name, wanted in (("tokenizer", ("layer", "chunk")), ("scalars", ("raw",))):
        if getattr(config, name) not in wanted:
            raise ValueError(f"{name} {getattr(config, name)!r}: the released code knows only {' and '.join(wanted)}")


def _names(config: GptConfig) -> Iterator[tuple[str, list[str]]]:
    """Our name of each tensor and theirs, several if ours is theirs concatenated."""
    yield "positions", [_POSITIONS]
    for ours, norm in (("norm_in", "ln_in"), ("norm_out", "ln_f")):
        yield from ((f"{ours}.{kind}", [f"decoder.{norm}.{kind}"]) for kind in ("weight", "bias"))
    layers = {"norm1": ["ln1"], "norm2": ["ln2"], "attn.qkv": ["attn.query", "attn.key", "attn.value"],
              "attn.proj": ["attn.proj"], "mlp.fc1": ["mlp.0"], "mlp.fc2": ["mlp.2"]}  # fmt: skip
    for i in range(config.depth):
        for ours, theirs in layers.items():
            for kind in ("weight", "bias"):
                yield f"blocks.{i}.{ours}.{kind}", [f"decoder.blocks.{i}.{layer}.{kind}" for layer in theirs]
    tokens = len(splits(config))
    encoders = [*(f"tokenizer.encoders.{i}" for i in range(2 * tokens)), *(f"scalars.encoders.{i}" for i in range(4))]
    for i, ours in enumerate(encoders):
        yield f"{ours}.weight", [f"decoder.input_parameter_projections.{i}.0.weight"]
    for i in range(tokens):
        yield f"tokenizer.decoders.{i}.weight", [f"decoder.output_parameter_projections.{i}.0.weight"]


def _check(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raises ValueError for the first tensor that is absent, of another shape or unknown."""
    remedy = "name the preset that the file was trained with"
    for name, shape in expected.items():
        if name not in state:
            raise ValueError(f"{path}: lacks {name} {shape}; {remedy}, or fetch the file again")
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{path}: {name} is {tuple(state[name].shape)}, this preset's {shape}; {remedy}")
    unknown = next((name for name in state if name not in expected and name != _FREQUENCIES), None)
    if unknown is not None:
        raise ValueError(f"{path}: {unknown} {tuple(state[unknown].shape)} is no part of this preset; {remedy}")
    theirs = state.get(_FREQUENCIES, raw_frequencies())
    if theirs.shape != (RAW_FREQUENCIES,) or not torch.allclose(theirs.float(), raw_frequencies(), rtol=1e-5):
        numbers = f"({len(theirs)} up to {theirs.max():g}), expected {RAW_FREQUENCIES} up to {2**RAW_OCTAVES:g}"
        raise ValueError(f"{path}: embeds scalars by other frequencies {numbers}; only these can be read")

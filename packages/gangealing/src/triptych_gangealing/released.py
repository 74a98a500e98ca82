"""Checkpoints of the released GANgealing code, both ways: averaged transformer, modes and classifier under other names.

Theirs is a design of ours: see `DESIGN`. A file is `{"g_ema", "t_ema", "ll", "args", ...}`, and "classifier" where there are
clusters; its generator is read by `stylegan2.weights`.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor
from triptych_common.storage import foreign
from triptych_common.storage.model_file import refuse_non_finite

from triptych_gangealing.config import DESIGNS, SMALLEST, Padding, SpatialTransformerConfig
from triptych_gangealing.stylegan2.shapes import FILTER, Row, numbers, renamed

DESIGN = DESIGNS["released"]
TRANSFORMER, MODES, CLASSIFIER = "t_ema", "ll", "classifier"
_BUFFERS = ("kernel", "kernel_horz", "kernel_vert", "one_hot", "rebias", "blur_filter")  # constants of their code
Tensors = Mapping[str, Tensor]


class Shapes(NamedTuple):
    """What the tensors of one of their networks tell about its shape."""

    halved: int  # residual blocks with half as many pixels behind
    blocks: int
    widths: tuple[int, ...]  # feature maps at the start and behind each block


def parts(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a released checkpoint, as an aligner's own file has them.

    Raises FileNotFoundError for an absent file, ValueError for one that is damaged, holds other objects than weights and
    settings, or whose networks have a shape that the released code does not build.
    """
    content = foreign.read(path)
    try:
        if not holds_aligner(content):
            raise ValueError(f"holds no {TRANSFORMER}: no checkpoint of the released GANgealing code")
        tensors, facts = _parts(content)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    refuse_non_finite(tensors, str(path))
    facts["facts"]["converted_from"] = path.name
    return tensors, facts


def holds_aligner(content: Any) -> bool:
    """Whether a file's content has a transformer of theirs."""
    return isinstance(content, Mapping) and isinstance(content.get(TRANSFORMER), Mapping)


def to_released(
    config: SpatialTransformerConfig, state: Tensors, facts: Mapping[str, Any], *, classifier: bool
) -> dict[str, Any]:
    """The entries "t_ema", "ll", "args" and, where there is one, "classifier" of an aligner's config, tensors and facts.

    Raises ValueError for an aligner that is not of their design, since their code would compute something else.
    """
    for name, value in DESIGN.items():
        wanted = float(config.flow_upsampling) if name == "flow_unit_factor" else value
        if "flow" not in config.transforms and name.startswith("flow"):
            continue
        if name.startswith("classifier") and not classifier:
            continue
        if getattr(config, name) != wanted:
            other = f"the aligner has {name} {getattr(config, name)}, the released code {wanted}"
            raise ValueError(f"{other}; train with --design released to export to it")
    single, transformer = len(config.transforms) == 1, dict[str, Tensor]()
    for place, kind in enumerate(config.transforms):
        rows = _rows(kind, _counted(config, kind), "" if single else f"stns.{place}.")
        transformer |= _to_theirs({name.removeprefix("transformer."): x for name, x in state.items()}, rows, config)
        transformer |= _constants(config, kind, "" if single else f"stns.{place}.")
    alpha, origins = state["mode.alpha"], state["mode.origins"]
    if not torch.equal(origins, origins[:1].expand_as(origins)):
        raise ValueError("the aligner's modes start at different points, the released code's all at the mean of W")
    found: dict[str, Any] = {
        TRANSFORMER: transformer,
        MODES: {"coefficients": alpha.clone(), "directions": state["mode.components"], "lat_mean": origins[:1].clone()},
        "args": argparse.Namespace(
            transform=list(config.transforms), flow_size=config.input_size, num_heads=config.heads,
            stn_channel_multiplier=config.channel_multiplier, padding_mode=config.padding, flips=bool(facts.get("flips")),
            ndirs=alpha.shape[1],
        ),
    }  # fmt: skip
    if classifier:
        rows = _classifier_rows(_counted(config, "similarity"))
        found[CLASSIFIER] = _to_theirs(state, rows, config) | _constants(config, "similarity", "", head=False)
    return found


def _parts(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    theirs, args = foreign.without_wrappers(content[TRANSFORMER]), _settings(content)
    size = args.pop("size")
    names = _places(theirs)
    heads = _heads(theirs, names)
    classifier = content.get(CLASSIFIER)
    own = foreign.without_wrappers(classifier) if isinstance(classifier, Mapping) else None
    config = _config(theirs, names, heads, args["padding"], own, size)
    tensors = _modes(content, heads)
    for kind, prefix in names.items():
        part = {name.removeprefix(prefix): x for name, x in theirs.items() if name.startswith(prefix)}
        rows = ((f"transformer.{ours}", name, how) for ours, name, how in _rows(kind, _counted(config, kind), ""))
        tensors |= _to_ours(part, rows, config)
    if own is not None:
        tensors |= _to_ours(own, _classifier_rows(_counted(config, "similarity")), config)
    facts = {"config": asdict(config), "has_classifier": own is not None, "facts": {"iterations": 1, **args}}
    return tensors, facts


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Padding, flips and input size of their command line."""
    args = content.get("args")
    given = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    padding = given.get("padding_mode", "reflection")
    if padding not in get_args(Padding):
        raise ValueError(f"args: padding_mode {padding!r}, expected one of {', '.join(get_args(Padding))}")
    size = given.get("flow_size", 128)
    if not isinstance(size, int) or not 2 * SMALLEST <= size <= 4096:
        raise ValueError(f"args: flow_size {size!r}, expected 8 to 4096")
    return {"padding": padding, "flips": given.get("flips") is True, "size": size}


def _places(theirs: Tensors) -> dict[str, str]:
    """Where the networks are: kind -> prefix of its names."""
    found = {}
    for prefix in ("", "stns.0.", "stns.1."):
        if f"{prefix}warp_head.linear.weight" in theirs:
            found["similarity"] = prefix
        if f"{prefix}warp_head.flow_out.0.weight" in theirs:
            found["flow"] = prefix
    if not found or list(found) != sorted(found, key=["similarity", "flow"].index):
        raise ValueError(f"{TRANSFORMER}: holds neither a similarity nor a flow network, or not in this order")
    return found


def _heads(theirs: Tensors, names: Mapping[str, str]) -> int:
    if "similarity" in names:
        return _of(theirs, names["similarity"] + "warp_head.linear.bias").shape[0] // 4
    return _of(theirs, names["flow"] + "warp_head.flow_out.2.bias").shape[0] // 2


def _config(
    theirs: Tensors,
    names: Mapping[str, str],
    heads: int,
    padding: Padding,
    classifier: Tensors | None,
    size: int,
) -> SpatialTransformerConfig:
    """The config that the tensors fit. Raises ValueError for a shape that no config has."""
    shapes = {kind: _shapes(theirs, prefix) for kind, prefix in names.items()}
    upsampling, classes = 8, None
    if "flow" in shapes:
        upsampling = 2 ** shapes["flow"].halved
        cells = _of(theirs, names["flow"] + "warp_head.mask_out.2.bias").shape[0]
        if cells != heads * 9 * upsampling**2:
            raise ValueError(f"{TRANSFORMER}: a mask of {cells} values, expected {heads * 9 * upsampling**2}")
    if "similarity" in shapes:
        size = SMALLEST * 2 ** shapes["similarity"].halved
    if classifier is not None:
        classes = _of(classifier, "to_logits.bias").shape[0]
        if classes not in (heads, 2 * heads):
            raise ValueError(f"{CLASSIFIER}: {classes} classes, expected {heads} clusters, or twice as many")
    one = next(iter(shapes.values()))
    most = one.widths[-1]
    design = {
        **DESIGN,
        "flow_unit_factor": float(upsampling),
        "classifier": "clusters" if classes == heads else "sides",
    }
    return SpatialTransformerConfig(
        input_size=size,
        channel_max=most,
        channel_multiplier=2 * one.widths[1] / most,
        heads=heads,
        transforms=cast(Any, tuple(names)),
        flow_size=size // upsampling,
        flow_upsampling=upsampling,
        padding=padding,
        **design,
    )


def _shapes(tensors: Tensors, prefix: str) -> Shapes:
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    blocks = len(numbers(own, r"convs\.(\d+)\.conv1\.0\.weight"))
    halved = len(numbers(own, r"convs\.(\d+)\.skip\.1\.weight"))
    if blocks < 1:
        raise ValueError(f"{prefix}convs: no residual blocks")
    ends = [_of(own, f"convs.{i}.skip.{int(i <= halved)}.weight").shape[0] for i in range(1, blocks + 1)]
    return Shapes(halved, blocks, (_of(own, "convs.0.0.weight").shape[0], *ends))


def _counted(config: SpatialTransformerConfig, kind: str) -> tuple[int, int]:
    """Residual blocks that halve, and all of them."""
    if kind == "similarity":
        halved = int(math.log2(config.input_size // SMALLEST))
        return halved, halved
    halved = int(math.log2(config.input_size // config.flow_size))
    return halved, halved + 1


def _of(tensors: Tensors, name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"lacks {name}")
    return tensors[name]


def _trunk_rows(ours: str, theirs: str, counts: tuple[int, int]) -> Iterator[Row]:
    yield f"{ours}.0.weight", f"{theirs}convs.0.0.weight", "same"
    yield f"{ours}.0.bias", f"{theirs}convs.0.1.bias", "same"
    halved, blocks = counts
    for i in range(1, blocks + 1):
        at = 1 if i <= halved else 0  # a filter comes first where there are fewer pixels behind
        block = f"{theirs}convs.{i}"
        yield f"{ours}.{i}.conv0.weight", f"{block}.conv1.0.weight", "same"
        yield f"{ours}.{i}.conv0.bias", f"{block}.conv1.1.bias", "same"
        yield f"{ours}.{i}.conv1.weight", f"{block}.conv2.{at}.weight", "same"
        yield f"{ours}.{i}.conv1.bias", f"{block}.conv2.{at + 1}.bias", "same"
        yield f"{ours}.{i}.skip.weight", f"{block}.skip.{at}.weight", "same"
    yield f"{ours}.{blocks + 1}.weight", f"{theirs}final_conv.0.weight", "same"
    yield f"{ours}.{blocks + 1}.bias", f"{theirs}final_conv.1.bias", "same"


def _rows(kind: str, counts: tuple[int, int], prefix: str) -> Iterator[Row]:
    yield from _trunk_rows(f"{kind}.trunk", prefix, counts)
    if kind == "similarity":
        hidden = counts[1] + 3  # behind the last convolution and the flattening
        yield f"similarity.trunk.{hidden}.weight", f"{prefix}final_linear.weight", "same"
        yield f"similarity.trunk.{hidden}.bias", f"{prefix}final_linear.bias", "same"
        yield "similarity.head.weight", f"{prefix}warp_head.linear.weight", "unscaled"
        yield "similarity.head.bias", f"{prefix}warp_head.linear.bias", "by parameter"
        return
    for ours, theirs in (("delta", "flow_out"), ("mask", "mask_out")):
        yield f"flow.{ours}.0.weight", f"{prefix}warp_head.{theirs}.0.weight", "same"
        yield f"flow.{ours}.0.bias", f"{prefix}warp_head.{theirs}.0.bias", "same"
        yield f"flow.{ours}.1.weight", f"{prefix}warp_head.{theirs}.2.weight", "behind relu"
        yield f"flow.{ours}.1.bias", f"{prefix}warp_head.{theirs}.2.bias", "same"


def _classifier_rows(counts: tuple[int, int]) -> Iterator[Row]:
    yield from _trunk_rows("classifier.trunk", "", counts)
    # Their logits pass a leaky ReLU, which changes no comparison of two of them.
    yield "classifier.head.weight", "to_logits.weight", "same"
    yield "classifier.head.bias", "to_logits.bias", "same"


def _factor(how: str, value: Tensor) -> float:
    """Theirs times it are ours."""
    # Their last linear layer of similarities has no equalised learning rate; their ReLU lacks our gain of sqrt(2).
    return {"unscaled": math.sqrt(value.shape[-1]), "behind relu": math.sqrt(0.5)}.get(how, 1.0)


def _to_ours(tensors: Tensors, rows: Iterator[Row], config: SpatialTransformerConfig) -> dict[str, Tensor]:
    def change(_name: str, value: Tensor, how: str) -> Tensor:
        value = value.detach().to(torch.float32) * _factor(how, value)
        if how in ("unscaled", "by parameter"):  # theirs: all rotations, then all scales; ours: head by head
            value = value.unflatten(0, (4, config.heads)).transpose(0, 1).flatten(0, 1)
        return value

    own = {name: x for name, x in tensors.items() if name.rpartition(".")[2] not in _BUFFERS}
    return renamed(own, rows, change, "the released")


def _to_theirs(state: Tensors, rows: Iterator[Row], config: SpatialTransformerConfig) -> dict[str, Tensor]:
    theirs = {}
    for ours, name, how in rows:
        value = state[ours].detach().cpu()
        if how in ("unscaled", "by parameter"):
            value = value.unflatten(0, (config.heads, 4)).transpose(0, 1).flatten(0, 1)
        theirs[name] = (value / _factor(how, value)).clone()
    return theirs


def _constants(config: SpatialTransformerConfig, kind: str, prefix: str, *, head: bool = True) -> dict[str, Tensor]:
    """Filters that their strict loading expects."""
    halved, _ = _counted(config, kind)
    found = {
        f"{prefix}convs.{i}.{name}.0.kernel": FILTER.clone() for i in range(1, halved + 1) for name in ("conv2", "skip")
    }
    if head:
        found[f"{prefix}warp_head.warper.blur_filter"] = FILTER[None, None].clone()
        if kind == "similarity":
            found[f"{prefix}warp_head.one_hot"] = torch.tensor([[[[0.0, 0.0, 1.0]]]])
    return found


def _modes(content: Mapping[str, Any], heads: int) -> dict[str, Tensor]:
    theirs = content.get(MODES)
    theirs = foreign.without_wrappers(theirs) if isinstance(theirs, Mapping) else {}
    if not theirs:
        raise ValueError(f"holds no {MODES}, the modes that pictures are aligned to")
    alpha, components, mean = (_of(theirs, name).float() for name in ("coefficients", "directions", "lat_mean"))
    if components.ndim != 2 or alpha.shape != (heads, len(components)) or mean.shape != (1, components.shape[1]):
        shapes = f"{tuple(alpha.shape)}, {tuple(components.shape)}, {tuple(mean.shape)}"
        raise ValueError(
            f"{MODES}: coefficients, directions and mean of shapes {shapes}, expected {heads} modes of one W"
        )
    found = {"alpha": alpha, "components": components, "origins": mean.repeat(heads, 1), "handicap": torch.zeros(heads)}
    return {f"mode.{name}": value for name, value in found.items()}

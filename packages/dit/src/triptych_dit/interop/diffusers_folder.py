"""Diffusers' DiT, both ways: a DiT as a folder that `DiTPipeline.from_pretrained` opens, and such a folder as a DiT.

Two settings decide whether the two networks are the same function: `mlp_norm_eps`, which diffusers' config carries, and
`timestep_frequency_shift`, which it does not: diffusers always has 1, the released models 0. A model of shift 1 is the same
there. One of shift 0 is another, the more so the later the timestep (relative difference 0.04 at t=100 and 0.3 at t=999 for
4 layers of weights N(0, 0.04)), until `use_released_timesteps` is called on the opened transformer.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triptych_common.storage import foreign
from triptych_common.storage.atomic import new_folder, write_json

from triptych_dit.interop.diffusers_state import renamed, translated
from triptych_dit.interop.label_tables import check_names, padded_table
from triptych_dit.interop.pipeline_parts import (
    RELEASED_REPOSITORIES,
    WEIGHTS,
    autoencoder_facts,
    checked_scheduler,
    checked_vae,
    fetched,
    import_diffusers,
    prediction,
)
from triptych_dit.interop.released import TABLE, assembled, require_square
from triptych_dit.model import DiT, sincos_position_embedding

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiTTransformer2DModel, SchedulerMixin

    from triptych_dit.autoencoder.model import Autoencoder

SIDE_FILE = "triptych.json"


def to_diffusers(
    model: DiT,
    folder: str | Path,
    *,
    vae: "AutoencoderKL | Autoencoder | str | Path | None" = None,
    scheduler: "SchedulerMixin | str | None" = None,
    id2label: Mapping[int | str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, float32, as a folder of diffusers; guidance works there for any number of classes.

    vae: what decodes its latents; without one, pass it to `DiTPipeline.from_pretrained(folder, vae=...)`.
    scheduler: an instance, or the name of a class of diffusers on the released noise schedule; by default DDIM.
    id2label: names of classes, synonyms separated by commas.
    facts: those of the model's file; by default it predicts noise.
    Raises ValueError for a model or parts that the pipeline cannot run, OSError where the folder cannot be written,
    ImportError without diffusers.
    """
    diffusers = import_diffusers()
    facts = {"predict": "noise"} | {
        name: fact for name, fact in (facts or {}).items() if name not in ("kind", "config")
    }
    folder, names = Path(folder), check_names(id2label, model.config)
    scheduler = checked_scheduler(scheduler, str(facts["predict"]))
    vae = None if vae is None else checked_vae(vae, model.config, facts)
    transformer = diffusers_transformer(model).float().cpu()
    index: dict[str, Any] = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__}
    if names:
        index["id2label"] = names
    with new_folder(folder, replaces=SIDE_FILE) as new:
        for name, part in (("transformer", transformer), ("scheduler", scheduler), ("vae", vae)):
            index[name] = [None, None] if part is None else ["diffusers", type(part).__name__]
            if part is not None:
                part.save_pretrained(new / name)
        write_json(new / "model_index.json", index)
        write_json(new / SIDE_FILE, {"config": asdict(model.config), "facts": facts})


def from_diffusers(
    source: str | Path, *, num_classes: int | None = None, timestep_frequency_shift: int | None = None
) -> DiT:
    """The transformer of a diffusers folder or hub repository as a DiT, float32, on the CPU and in evaluation mode.

    The options come from the folder's triptych.json where there is one. Without, the label table tells the number of
    classes, and the network is the function that diffusers computes (shift 1, its norm_eps), except for the repositories
    of the released weights, which were trained with shift 0 and epsilon 1e-6.
    Raises OSError where there is no such folder or repository, ValueError for one that is not of a DiT.
    """
    return _read(source, num_classes, timestep_frequency_shift)[0]


def read_folder(source: str | Path, *, num_classes: int | None = None) -> tuple[DiT, dict[str, Any]]:
    """`from_diffusers`, and the facts of the model: what it predicts, and its autoencoder where the folder has one.

    Raises ValueError besides for a pipeline of another diffusion process than the released one.
    """
    model, root, facts = _read(source, num_classes)
    if not facts:
        facts = {"predict": prediction(_read_json(root / "scheduler" / "scheduler_config.json"), str(source))}
    vae = _read_json(root / "vae" / "config.json")
    facts["autoencoder"] = autoencoder_facts(vae, str(source), facts.get("autoencoder"))
    return model, {**facts, "source": str(source)}


def _read(
    source: str | Path, num_classes: int | None, timestep_frequency_shift: int | None = None
) -> tuple[DiT, Path, dict[str, Any]]:
    """The model, where its folder lies, and the facts of its triptych.json."""
    root = Path(source).expanduser()
    if not root.is_dir():
        root = fetched(str(source))
    folder = root / "transformer" if (root / "transformer").is_dir() else root
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{source}: no config.json; expected a folder of diffusers with a DiT, or its transformer's"
        )
    theirs, side = _read_json(folder / "config.json"), _read_json(root / SIDE_FILE)
    try:
        known = side.get("config", {})
        released = str(source) in RELEASED_REPOSITORIES
        shift = known.get("timestep_frequency_shift", 0 if released else 1)
        state = _read_weights(folder)
        config, ours = translated(
            theirs if not released else {**theirs, "norm_eps": 1e-6},
            state,
            num_classes=known.get("num_classes") if num_classes is None else num_classes,
            shift=shift if timestep_frequency_shift is None else timestep_frequency_shift,
            dropout=known.get("class_dropout_prob"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: config.json or {SIDE_FILE} is not of a DiT ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return assembled(config, ours, str(source)), root, dict(side.get("facts", {}))


def diffusers_transformer(model: DiT) -> "DiTTransformer2DModel":
    """A model as diffusers' module, of its own dtype and sharing some of its memory; see this file's top on when both are
    the same function.

    Raises ValueError for a model that diffusers has no module for.
    """
    config = model.config
    for name, wanted in (("block_design", "adaln_zero"), ("mlp_ratio", 4)):
        if getattr(config, name) != wanted:
            raise ValueError(f"export: {name} {getattr(config, name)}: diffusers' DiT knows only {wanted}")
    require_square(config, "diffusers' DiT")
    position = sincos_position_embedding(*config.grid, config.hidden_size).to(model.pos_embed.dtype)
    if float((model.pos_embed[0].cpu() - position).abs().max()) > 1e-6:
        raise ValueError("export: the position embedding is not the sine-cosine one, the only one of diffusers' DiT")
    table = padded_table(config, None if model.y_embedder is None else model.y_embedder.embedding_table.weight)
    with torch.device("meta"):
        transformer = import_diffusers().DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=config.input_size[0],
            patch_size=config.patch_size,
            num_embeds_ada_norm=len(table) - 1,
            norm_eps=config.mlp_norm_eps,
        )
    transformer.load_state_dict(
        renamed({**model.state_dict(), TABLE: table.to(model.pos_embed)}, config.depth), assign=True
    )
    transformer.pos_embed.pos_embed = model.pos_embed.detach().clone()
    return transformer.eval()


def use_released_timesteps(transformer: "DiTTransformer2DModel", shift: int = 0) -> None:
    """Give an opened diffusers DiT the timestep frequencies that the released models, and ours of shift 0, are trained with."""
    for module in transformer.modules():
        if type(module).__name__ == "Timesteps":
            module.downscale_freq_shift = shift


def is_of_diffusers(folder: Path) -> bool:
    """Whether a folder is a pipeline or model of diffusers', of whatever kind."""
    return (folder / "model_index.json").is_file() or "_class_name" in _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a transformer's folder, in one file or in shards."""
    for suffix in (".safetensors", ".bin"):
        whole, index = folder / f"{WEIGHTS}{suffix}", folder / f"{WEIGHTS}{suffix}.index.json"
        if whole.is_file():
            return dict(foreign.read(whole))
        if index.is_file():
            shards = sorted(set(_read_json(index)["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in foreign.read(folder / shard).items()}
    raise FileNotFoundError(f"{folder}: has no {WEIGHTS}.safetensors")

"""Diffusers' DiT, both ways: a DiT as a folder that `DiTPipeline.from_pretrained` opens, and such a folder as a DiT.

Two settings decide whether the two networks compute the same function. Diffusers' config carries the first,
`mlp_norm_eps`, but not the second, `timestep_frequency_shift`: diffusers always has 1, the released models 0. A model of
shift 1 computes the same there. A model of shift 0 does not, and the difference grows with the timestep (relative
difference 0.04 at t=100 and 0.3 at t=999 for 4 layers of weights N(0, 0.04)), until `use_released_timesteps` is called on
the opened transformer.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.storage import foreign
from triptych_common.storage.files import FileName, check, new_folder, open_ended, read_json, write_json
from typing_extensions import TypedDict

from triptych_dit.config import DiTConfig
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
from triptych_dit.interop.released import TABLE, assembled, check_keys, fold_table, require_square, skeleton
from triptych_dit.labels import of_id2label
from triptych_dit.model import DiT, sincos_position_embedding
from triptych_dit.weights import Facts, Prediction, recorded

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiTTransformer2DModel, SchedulerMixin

    from triptych_dit.autoencoder.model import Autoencoder

Rows = Float[Tensor, "_ width"]  # of a label table
SIDE_FILE = "triptych.json"
NULL_ROW = 1000  # the row of the label table that DiTPipeline takes for "no class", however many classes there are

# Ours -> theirs; qkv is three there, and every block has a copy of the embeddings.
_OUTER = {
    "x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2",
}  # fmt: skip
_INNER = {
    "adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
}  # fmt: skip
_EMBEDDINGS = {
    f"t_embedder.mlp.{ours}.{end}": f"norm1.emb.timestep_embedder.linear_{theirs}.{end}"
    for ours, theirs in ((0, 1), (2, 2))
    for end in ("weight", "bias")
} | {TABLE: "norm1.emb.class_embedder.embedding_table.weight"}


def to_diffusers(
    model: DiT, folder: str | Path, *, vae: "AutoencoderKL | Autoencoder | str | Path | None" = None,
    scheduler: "SchedulerMixin | str | None" = None, id2label: Mapping[int, Any] | Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write a model, in float32, as a folder that `DiTPipeline.from_pretrained` opens, replacing an earlier export.

        to_diffusers(load_model("runs/dit").model, "exported")
        images = DiTPipeline.from_pretrained("exported")(class_labels=[3, 7], guidance_scale=1.5).images

    model: a DiT of square inputs with adaLN-Zero blocks.
    vae: decoder of the model's latents. Without it, pass one to `DiTPipeline.from_pretrained(folder, vae=...)`.
    scheduler: an instance, or the name of a class of diffusers, made for the released noise schedule; by default DDIM.
    id2label: names of the classes by label; synonyms are separated by commas. By default those of the facts.
    facts: those of the model's file (what it predicts, its autoencoder, names); by default it predicts noise.

    Raises ValueError for a model or parts that the pipeline cannot run, OSError if the folder cannot be written, ImportError
    without diffusers.
    """
    diffusers = import_diffusers()
    facts = {"predict": "noise", **recorded(facts or {})}
    id2label = dict(enumerate(facts.get("class_names") or ())) if id2label is None else id2label
    folder, names = Path(folder), check_names(id2label if model.config.num_classes else None, model.config)
    autoencoder = None if vae is None else checked_vae(vae, model.config, facts)
    if autoencoder is not None:
        facts["autoencoder"] = autoencoder.facts()
    parts: dict[str, Any] = {
        "scheduler": checked_scheduler(scheduler, str(facts["predict"])),
        "vae": autoencoder and autoencoder.module,
        "transformer": diffusers_transformer(model).float().cpu(),
    }
    index: dict[str, Any] = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__}
    if names:
        index["id2label"] = names
    with new_folder(folder, replaces=SIDE_FILE) as new:
        for name, part in parts.items():
            index[name] = [None, None] if part is None else ["diffusers", type(part).__name__]
            if part is not None:
                part.save_pretrained(new / name)
        write_json(new / "model_index.json", index)
        write_json(new / SIDE_FILE, {"config": asdict(model.config), "facts": facts})


def from_diffusers(
    source: str | Path, *, num_classes: int | None = None, timestep_frequency_shift: int | None = None
) -> DiT:
    """The transformer of a diffusers folder or hub repository, as a DiT: float32, on the CPU, in evaluation mode.

    source: a pipeline's folder, its transformer's folder, or a hub repository, such as "facebook/DiT-XL-2-256".
    num_classes: by default that of the folder's triptych.json, else inferred from the rows of the label table.
    timestep_frequency_shift: likewise; without triptych.json 1, as diffusers computes, except for the repositories of the
        released weights, which were trained with 0 (and epsilon 1e-6).
    Raises OSError if there is no such folder or repository, ValueError if it is not of a DiT.
    """
    return _read(source, num_classes, timestep_frequency_shift)[0]


def read_folder(
    source: str | Path, *, num_classes: int | None = None, predict: Prediction | None = None
) -> tuple[DiT, dict[str, Any]]:
    """Like `from_diffusers`, with the facts of the model: what it predicts, its autoencoder and names of its classes, as far
    as the folder has them.

    predict: replaces what the scheduler says. Raises ValueError also for a pipeline of a diffusion process other than the
    released one.
    """
    model, root, facts = _read(source, num_classes)
    scheduler = _read_json(root / "scheduler" / "scheduler_config.json")
    if "predict" not in facts and (predict or scheduler):
        facts["predict"] = predict or prediction(scheduler, str(source))
    if facts.get("predict", "noise") not in ("noise", "sample"):
        raise ValueError(f"{root / SIDE_FILE}: predict {facts['predict']!r}, expected noise or sample")
    if vae := _read_json(root / "vae" / "config.json"):
        facts["autoencoder"] = autoencoder_facts(vae, str(source), facts.get("autoencoder"))
    names = _read_json(root / "model_index.json").get("id2label")
    if names and "class_names" not in facts:
        names = check(names, dict[str, str], source=f"{source}: id2label", remedy="fetch the folder again")
        rows = (pipeline_label(label, model.config) for label in range(model.config.num_classes))
        facts["class_names"] = of_id2label(names, rows)
    return model, {**facts, "source": str(source)}


def _read(
    source: str | Path, num_classes: int | None, timestep_frequency_shift: int | None = None
) -> tuple[DiT, Path, dict[str, Any]]:
    """The model, its folder, and the facts of its triptych.json."""
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
    facts = side.get("facts", {})
    if facts:
        check(facts, Facts, source=str(root / SIDE_FILE), remedy="fetch the folder again")
    return assembled(config, ours, str(source)), root, dict(facts)


def diffusers_transformer(model: DiT) -> "DiTTransformer2DModel":
    """A model as diffusers' module, in the model's dtype and sharing some of its memory; see above for when both compute the
    same function. Raises ValueError for a model that diffusers has no module for.
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
        # Positions are no part of diffusers' state dict, so they are set afterwards.
        transformer = import_diffusers().DiTTransformer2DModel(
            num_attention_heads=config.num_heads, attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.in_channels, out_channels=config.out_channels, num_layers=config.depth,
            sample_size=config.input_size[0], patch_size=config.patch_size, num_embeds_ada_norm=len(table) - 1,
            norm_eps=config.mlp_norm_eps,
        )  # fmt: skip
    ours = {**model.state_dict(), TABLE: table.to(model.pos_embed)}
    transformer.load_state_dict(renamed(ours, config.depth), assign=True)
    transformer.pos_embed.pos_embed = model.pos_embed.detach().clone()
    return transformer.eval()


def use_released_timesteps(transformer: "DiTTransformer2DModel", shift: int = 0) -> None:
    """Give a diffusers DiT the timestep frequencies with which the released models, and ours of shift 0, were trained."""
    for module in transformer.modules():
        if type(module).__name__ == "Timesteps":
            module.downscale_freq_shift = shift


def is_of_diffusers(folder: Path) -> bool:
    """Whether a folder is a pipeline or model of diffusers', of whatever kind."""
    parts = ("model_index.json", "transformer/config.json")
    return any((folder / part).is_file() for part in parts) or "_class_name" in _read_json(folder / "config.json")


@open_ended
class _WeightIndex(TypedDict):
    weight_map: dict[str, FileName]


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.is_file():
        return {}
    return read_json(path, remedy="fetch the folder again")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a transformer's folder, in one file or in shards, of whatever variant (such as fp16) it has."""
    for suffix in (".safetensors", ".bin"):
        whole, index = folder / f"{WEIGHTS}{suffix}", f"{WEIGHTS}{suffix}.index"
        if whole.is_file():
            return dict(foreign.read(whole))
        for listed in (folder / f"{index}.json", *sorted(folder.glob(f"{index}.*.json"))):
            if listed.is_file():
                content = check(_read_json(listed), _WeightIndex, source=str(listed), remedy="fetch the folder again")
                shards = sorted(set(content["weight_map"].values()))
                return {name: tensor for shard in shards for name, tensor in foreign.read(folder / shard).items()}
        for variant in sorted(folder.glob(f"{WEIGHTS}.*{suffix}")):
            return dict(foreign.read(variant))
    raise FileNotFoundError(f"{folder}: has no {WEIGHTS}.safetensors")


def _pairs(depth: int) -> dict[str, str]:
    """Our name and theirs of every tensor that is the same in both."""
    modules = dict(_OUTER)
    for i in range(depth):
        modules |= {f"blocks.{i}.{ours}": f"transformer_blocks.{i}.{theirs}" for ours, theirs in _INNER.items()}
    return {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in modules.items() for end in ("weight", "bias")}


def renamed(ours: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Our state dict under diffusers' names. Copies are copies: safetensors refuses tensors that share memory."""
    state = {theirs: ours[name] for name, theirs in _pairs(depth).items()}
    for i in range(depth):
        for end in ("weight", "bias"):
            for part, tensor in zip("qkv", ours[f"blocks.{i}.attn.qkv.{end}"].chunk(3), strict=True):
                state[f"transformer_blocks.{i}.attn1.to_{part}.{end}"] = tensor.clone()
        state |= {f"transformer_blocks.{i}.{theirs}": ours[name].clone() for name, theirs in _EMBEDDINGS.items()}
    return state


def translated(
    theirs: Mapping[str, Any], state: dict[str, Tensor], *, num_classes: int | None, shift: int, dropout: float | None
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Config and state dict of ours for diffusers' config and state dict."""
    kinds = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter in old folders
    if theirs.get("_class_name") not in kinds or theirs.get("norm_type") != "ada_norm_zero":
        raise ValueError(f"a {theirs.get('_class_name')} with norm_type {theirs.get('norm_type')}; expected {kinds[0]}")
    fixed = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
    for name, wanted in fixed.items():
        if theirs.get(name, wanted) != wanted:
            raise ValueError(f"{name} {theirs[name]}: a DiT has {wanted}")
    depth, width = theirs["num_layers"], theirs["num_attention_heads"] * theirs["attention_head_dim"]
    in_channels = theirs["in_channels"]
    out_channels = theirs.get("out_channels") or in_channels
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(f"out_channels {out_channels} for in_channels {in_channels}: a DiT has as many or twice")
    shape = DiTConfig(
        input_size=(theirs["sample_size"],) * 2, in_channels=in_channels, patch_size=theirs["patch_size"],
        hidden_size=width, depth=depth, num_heads=theirs["num_attention_heads"],
        num_classes=theirs["num_embeds_ada_norm"], learn_sigma=out_channels != in_channels,
        timestep_frequency_shift=shift, mlp_norm_eps=theirs.get("norm_eps", 1e-5),
    )  # fmt: skip
    state.pop("pos_embed.pos_embed", None)  # old folders have it; it is the sine-cosine one
    expected = skeleton(shape, state, "transformer").state_dict()
    expected[TABLE] = torch.empty(theirs["num_embeds_ada_norm"] + 1, width, device="meta")
    check_keys(state, renamed(expected, depth), "transformer")
    # Diffusers gives every block a copy of the embedders, which training there lets drift apart.
    for theirs_name in _EMBEDDINGS.values():
        first = state[f"transformer_blocks.0.{theirs_name}"]
        if not all(torch.equal(first, state[f"transformer_blocks.{i}.{theirs_name}"]) for i in range(1, depth)):
            raise ValueError(f"blocks differ in {theirs_name}, which all blocks of a DiT share; trained in diffusers?")
    rows, num_classes, has_null = unpadded_table(state[f"transformer_blocks.0.{_EMBEDDINGS[TABLE]}"], num_classes)
    ours = {name: state[theirs_name] for name, theirs_name in _pairs(depth).items()}
    ours |= {name: state[f"transformer_blocks.0.{theirs_name}"] for name, theirs_name in _EMBEDDINGS.items()}
    for i in range(depth):
        for end in ("weight", "bias"):
            parts = [state[f"transformer_blocks.{i}.attn1.to_{part}.{end}"] for part in "qkv"]
            ours[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(parts)
    ours["pos_embed"] = sincos_position_embedding(*shape.grid, width)[None]
    ours[TABLE] = rows
    if not num_classes:
        fold_table(ours)
    dropout = (dropout or 0.1) if has_null else 0.0
    return replace(shape, num_classes=num_classes, class_dropout_prob=dropout), ours


def padded_table(config: DiTConfig, table: Rows | None) -> Rows:
    """The label table with the null row both where diffusers' model expects it, last, and where its pipeline does, in row 1000."""
    n = config.num_classes
    if table is None:  # no classes: every label and guidance scale gives the same image
        return torch.zeros(NULL_ROW + 1, config.hidden_size)
    if config.null_label is None:  # so that guidance on up to 1000 classes finds no row, rather than a wrong one
        return table
    null = table[n:]
    if n <= NULL_ROW:  # rows up to 1000 repeat the null row
        return torch.cat([table[:n], null.expand(NULL_ROW + 1 - n, -1)])
    # Class 1000 makes room: its row becomes the second to last.
    return torch.cat([table[:NULL_ROW], null, table[NULL_ROW + 1 : n], table[NULL_ROW : NULL_ROW + 1], null])


def pipeline_label(label: int, config: DiTConfig) -> int:
    """The row of the padded table that holds a class."""
    return config.num_classes if label == NULL_ROW and config.null_label is not None else label


def unpadded_table(table: Rows, num_classes: int | None = None) -> tuple[Rows, int, bool]:
    """Undo `padded_table`, judging by repeated rows alone: our table, the number of classes, and whether it has a null label.

    num_classes: by default inferred from the rows. For a table without a null label it must be given.
    Raises ValueError if the rows contradict num_classes.
    """
    rows = len(table)
    # Trained rows are never equal, so rows equal to the last one are copies of the null row.
    null = (table == table[-1]).all(dim=1)
    if rows > NULL_ROW + 2 and bool(null[NULL_ROW]):
        found = rows - 2
        kept = torch.cat([table[:NULL_ROW], table[found : found + 1], table[NULL_ROW + 1 : found], table[-1:]])
    else:
        found = rows - int(null.flip(0).cumprod(0).sum())  # where the last run of equal rows begins
        kept = table[: found + 1]
    if num_classes is None or num_classes == found:
        return kept, found, True
    if num_classes == rows and num_classes:
        return table, rows, False
    raise ValueError(
        f"num_classes {num_classes}: the label table has {rows} rows, which fits {found} with a null label or {rows} without"
    )


def check_names(id2label: Mapping[int, Any] | Mapping[str, Any] | None, config: DiTConfig) -> dict[str, str]:
    """Names of classes by the label that the pipeline takes, as in model_index.json. Raises ValueError for other labels."""
    names: dict[str, str] = {}
    for key, name in (id2label or {}).items():
        label = int(key) if str(key).isdecimal() else -1
        if not 0 <= label < config.num_classes or not isinstance(name, str):
            raise ValueError(f"id2label {key!r}: {name!r}: expected labels 0..{config.num_classes - 1} and their names")
        names[str(pipeline_label(label, config))] = name
    return names

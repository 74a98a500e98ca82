"""Every layout in docs/checkpoints.md, built with small random weights and read back exactly."""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from triptych_dit import DiTConfig, to_diffusers
from triptych_dit.autoencoder.cache import LatentCache, LatentData
from triptych_dit.autoencoder.model import load_autoencoder
from triptych_dit.interop import diffusers_transformer, export_released, load_any
from triptych_dit.testing import random_model, random_vae, run_dit
from triptych_dit.weights import save_model
from triptych_gangealing.aligner import Aligner, load_aligner, write_aligner
from triptych_gangealing.config import DESIGNS, SpatialTransformerConfig
from triptych_gangealing.modes import Directions, Mode
from triptych_gangealing.released import to_released
from triptych_gangealing.spatial_transformer import ClusterClassifier, SpatialTransformer
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.rosinality import to_rosinality
from triptych_gangealing.stylegan2.weights import load_generator, write_network
from triptych_gpt import Gpt, GptConfig
from triptych_gpt import interop as gpt
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.presets import PRESETS
from triptych_gpt.prompting import theta_of

PAGE = Path(__file__).parent.parent / "docs" / "checkpoints.md"
SMALL = DiTConfig((8, 8), 4, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=7)
Tensors = Mapping[str, Tensor]
State = dict[str, Tensor]
STEP = {
    "epoch": 3,
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
}


def dit(seed: int = 0) -> State:
    return dict(random_model(SMALL, seed=seed, dtype=torch.float32).state_dict())


def under(prefix: str, state: Tensors) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def within(wrapper: str, state: Tensors) -> State:
    return {re.sub(r"(blocks\.\d+\.)", rf"\1{wrapper}.", name): tensor for name, tensor in state.items()}


def beside(state: Tensors) -> dict[str, Any]:
    numpy = {"numpy": np.random.RandomState(0).get_state(), "best": np.float64(0.5), "curve": np.arange(3)}
    return {
        "state_dict": state,
        "out": Path("runs/a"),
        "rng": torch.get_rng_state(),
        "cuda": [torch.get_rng_state()],
        **numpy,
    }


def training(state: Tensors) -> dict[str, Any]:
    args = argparse.Namespace(model="DiT-S/2", image_size=64, num_classes=7, results_dir=Path("results"))
    return {"model": dit(1), "ema": state, "opt": STEP["optimizer"], "args": args}


# What torch.save writes, given the averaged weights.
FILES: dict[str, Callable[[State], Any]] = {
    "state dict, `.pt`": lambda x: x,
    "state dict in half precision": lambda x: {name: tensor.half() for name, tensor in x.items()},
    "`{model, ema, opt, args}`": training,
    "`{model_state_dict, epoch, ...}`": lambda x: {"model_state_dict": x, **STEP},
    "`{state_dict, state_dict_ema}`": lambda x: {"state_dict": dit(1), "state_dict_ema": x},
    "`{state_dict, ...}` beside paths, numpy values and random states": beside,
    "`state_dict` with `model.`": lambda x: {"state_dict": under("model.", x), "callbacks": {}, "hyper_parameters": {"a": 1}},
    "`state_dict` with `net.`": lambda x: {"state_dict": under("net.", x), "loops": {}},
    "`state_dict` with `model.` and `ema_model.`": lambda x: {"state_dict": under("model.", dit(1)) | under("ema_model.", x)},
    "`ema_model.` and `online_model.`": lambda x: {
        **under("online_model.", dit(1)), **under("ema_model.", x), "initted": torch.tensor(1), "step": torch.tensor(9),
    },
    "`module.` and `n_averaged`": lambda x: {"n_averaged": torch.tensor(3), **under("module.", x)},
    "`module.`": lambda x: under("module.", x),
    "`_orig_mod.`": lambda x: under("_orig_mod.", x),
    "`_orig_mod.` within blocks": lambda x: within("_orig_mod", x),
    "`_checkpoint_wrapped_module.` within blocks": lambda x: {"model": within("_checkpoint_wrapped_module", x)},
    "`_fsdp_wrapped_module.` at several levels": lambda x: under(
        "_fsdp_wrapped_module.", within("_fsdp_wrapped_module._checkpoint_wrapped_module", x)
    ),
    "trained parameters alone, without `pos_embed`": lambda x: {name: x[name] for name in x if name != "pos_embed"},
}  # fmt: skip


def of_file(layout: str, folder: Path) -> tuple[Tensors, Tensors]:
    state = dit()
    torch.save(FILES[layout](state), folder / "file.pt")
    options: dict[str, Any] = {"input_size": 8} if "pos_embed" in layout else {}
    if "half" in layout:
        state = {name: tensor.half().float() for name, tensor in state.items()}
    return load_any(folder / "file.pt", num_heads=2, **options).model.state_dict(), state


def legacy(folder: Path) -> tuple[Tensors, Tensors]:
    torch.save(dit(), folder / "file.pt", _use_new_zipfile_serialization=False)
    return load_any(folder / "file.pt", num_heads=2).model.state_dict(), dit()


def safetensors(folder: Path) -> tuple[Tensors, Tensors]:
    save_file(dit(), folder / "file.safetensors")
    return load_any(folder / "file.safetensors", num_heads=2).model.state_dict(), dit()


def of_trainer(name: str, folder: Path) -> tuple[Tensors, Tensors]:
    (save_file if name.endswith("safetensors") else torch.save)(dit(), folder / name)
    return load_any(folder, num_heads=2).model.state_dict(), dit()


def of_transformer(folder: Path, **options: Any) -> tuple[Tensors, Tensors]:
    model = random_model(replace(SMALL, timestep_frequency_shift=1), dtype=torch.float32)
    if options.get("variant") == "fp16":
        model = model.half().float()
        model.pos_embed.copy_(random_model(SMALL, dtype=torch.float32).pos_embed)
    diffusers_transformer(model).save_pretrained(folder / "transformer", **options)
    return load_any(folder).model.state_dict(), model.state_dict()


def pipeline(folder: Path) -> tuple[Tensors, Tensors]:
    model = random_model(SMALL, dtype=torch.float32)
    to_diffusers(model, folder / "out", vae=random_vae(latent_channels=4))
    return load_any(folder / "out").model.state_dict(), model.state_dict()


def exported(folder: Path) -> tuple[Tensors, Tensors]:
    model = random_model(SMALL, dtype=torch.float32)
    export_released(model, folder / "model.pt", {"predict": "sample"})
    trained = load_any(folder / "model.pt", num_heads=2)
    assert trained.diffusion.predict == "sample"
    return trained.model.state_dict(), model.state_dict()


def own(folder: Path) -> tuple[Tensors, Tensors]:
    model = random_model(SMALL, dtype=torch.float32)
    save_model(folder / "model.safetensors", model, {"predict": "noise"})
    assert load_any(folder).model.config == load_any(folder / "model.safetensors").model.config
    return load_any(folder).model.state_dict(), model.state_dict()


def vae(folder: Path, at: str = "", **options: Any) -> tuple[Tensors, Tensors]:
    module = random_vae(latent_channels=4)
    if options.get("variant") == "fp16":
        module = module.half().float()
    module.save_pretrained(folder / at, **options)
    return load_autoencoder(str(folder)).module.state_dict(), module.state_dict()


LATENTS, LABELS = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])


def latents(folder: Path, write: Callable[[Path], Path], *options: str) -> tuple[Tensors, Tensors]:
    (folder / "in").mkdir()
    done = run_dit("import", "--features", write(folder / "in"), *options, "--out", folder / "cache")
    assert done.returncode == 0, done.stderr
    data = LatentData(LatentCache(folder / "cache"))
    found = data.examples(torch.arange(5), torch.zeros(5, dtype=torch.bool), 0, range(5))
    torch.testing.assert_close(found, LATENTS, rtol=1e-5, atol=1e-5)  # floats that were divided and multiplied again
    return {"labels": data.labels}, {"labels": LABELS}


def fast_dit(folder: Path) -> Path:
    for end, values in (("features", LATENTS), ("labels", LABELS)):
        (folder / f"imagenet256_{end}").mkdir()
        for i in range(5):
            np.save(folder / f"imagenet256_{end}" / f"{i}.npy", values[i : i + 1].numpy())
    return folder


def lightning_dit(folder: Path) -> Path:
    tensors = {"latents": LATENTS, "latents_flip": LATENTS.flip(-1).contiguous(), "labels": LABELS}
    save_file(tensors, folder / "latents_rank00_shard000.safetensors")
    return folder


def npz(folder: Path) -> Path:
    np.savez(folder / "latents.npz", latents=LATENTS.numpy(), labels=LABELS.numpy())
    return folder / "latents.npz"


def of_gpt(folder: Path, content: Callable[[State], Any]) -> tuple[Tensors, Tensors]:
    config = GptConfig(PRESETS["cartpole"].symmetry, "layer", None, 24, 2, 3, scalars="raw")
    model = Gpt(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    torch.save(content(gpt.export_released(model)), folder / "gpt.pt")
    return gpt.load_released(folder / "gpt.pt", config).state_dict(), model.state_dict()


def of_network(folder: Path, content: Callable[[State], Any], suffix: str = ".pt") -> tuple[Tensors, Tensors]:
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).state_dict()
    layout = ParameterLayout({name: tuple(x.shape) for name, x in network.items() if x.is_floating_point()})
    (save_file if suffix == ".safetensors" else torch.save)(content(dict(network)), folder / f"net{suffix}")
    return {"theta": theta_of(folder / f"net{suffix}", layout)}, {"theta": layout.flatten(network)}


def of_generator(folder: Path, content: Callable[[State, Tensor], Any] | None) -> tuple[Tensors, Tensors]:
    generator = Generator(GeneratorConfig(16, 128, 12, z_dim=16, w_dim=16, mapping_layers=2))
    if content is None:
        write_network(folder / "generator.safetensors", generator, {})
        return load_generator(folder).state_dict(), generator.state_dict()
    theirs = to_rosinality(generator)
    torch.save(content(theirs["g_ema"], theirs["latent_avg"]), folder / "a.pt")
    return load_generator(folder / "a.pt").state_dict(), generator.state_dict()


def of_aligner(folder: Path, *, released: bool, classifier: bool = False) -> tuple[Tensors, Tensors]:
    shape = SpatialTransformerConfig(
        32, 8, heads=2, flow_size=8, flow_upsampling=4, **{**DESIGNS["released"], "flow_unit_factor": 4.0}
    )
    mode = Mode(Directions(torch.zeros(6), torch.ones(1, 6), torch.ones(1)), 2)
    aligner = Aligner(SpatialTransformer(shape), mode, ClusterClassifier(shape) if classifier else None)
    facts = {"padding": "border", "iterations": 1, "flips": False}
    if not released:
        write_aligner(folder / "aligner.safetensors", aligner, facts)
        return load_aligner(folder).state_dict(), aligner.state_dict()
    content = to_released(shape, aligner.state_dict(), facts, classifier=classifier)
    torch.save({"g_ema": {}, **content, "iter": 750_000}, folder / "a.pt")
    found, given = (
        x.align(torch.zeros(1, 3, 32, 32), cluster=torch.ones(1).long())
        for x in (load_aligner(folder / "a.pt"), aligner)
    )
    return {"grid": found.warp.grid((32, 32)).mul(1e5).round()}, {"grid": given.warp.grid((32, 32)).mul(1e5).round()}


LAYOUTS: dict[str, Callable[[Path], tuple[Tensors, Tensors]]] = {
    **{layout: partial(of_file, layout) for layout in FILES},
    "state dict, `.pt` of before torch 1.6": legacy,
    "state dict, `.safetensors`": safetensors,
    "folder with `model.safetensors`": partial(of_trainer, "model.safetensors"),
    "folder with `pytorch_model.bin`": partial(of_trainer, "pytorch_model.bin"),
    "pipeline's folder": pipeline,
    "transformer's folder": of_transformer,
    "fp16 variant": partial(of_transformer, variant="fp16"),
    "shards with an index": partial(of_transformer, max_shard_size="20KB"),
    "shards of a variant": partial(of_transformer, max_shard_size="20KB", variant="fp16"),
    "`.bin` of diffusers": partial(of_transformer, safe_serialization=False),
    "`{ema, triptych}`": exported,
    "model file, run's folder": own,
    "autoencoder's folder": vae,
    "autoencoder's folder, fp16 variant": partial(vae, variant="fp16"),
    "autoencoder's folder, shards": partial(vae, max_shard_size="20KB"),
    "autoencoder in a pipeline's folder": partial(vae, at="vae"),
    "`NAME_features/*.npy`, `NAME_labels/*.npy`": lambda folder: latents(folder, fast_dit),
    "`latents`, `latents_flip`, `labels` in `.safetensors` shards": lambda folder: latents(
        folder, lightning_dit, "--raw", "--scale-factor", "1"
    ),
    "latents and labels in one `.npz`": lambda folder: latents(folder, npz, "--scale-factor", "0.5"),
    "`{G, G_ema, ...}` of G.pt": lambda folder: of_gpt(folder, lambda x: {"G": under("", {}), "G_ema": x, "step": 3}),
    "`{G}` of G.pt with `module.` and `_orig_mod.`": lambda folder: of_gpt(folder, lambda x: {"G": under("module._orig_mod.", x)}),
    "network's state dict": lambda folder: of_network(folder, lambda x: x),
    "network's state dict, `.safetensors`": lambda folder: of_network(folder, lambda x: x, ".safetensors"),
    "network's `{model_state_dict, optimizer, ...}`": lambda folder: of_network(folder, lambda x: {"model_state_dict": x, **STEP}),
    "network's `state_dict` with `net._orig_mod.`": lambda folder: of_network(
        folder, lambda x: {"state_dict": under("net._orig_mod.", x), "out": Path("runs/a")}
    ),
    "`{g_ema, g, d, latent_avg, ...}`": lambda folder: of_generator(
        folder, lambda x, average: {"g": {}, "g_ema": x, "latent_avg": average, "args": argparse.Namespace(path=Path("data"))}
    ),
    "`{g_ema}` with `module.`": lambda folder: of_generator(
        folder, lambda x, average: {"g_ema": under("module.", x), "latent_avg": average}
    ),
    "generator's file, run's folder": lambda folder: of_generator(folder, None),
    "aligner's file, run's folder, checkpoint of a run": partial(of_aligner, released=False),
    "`{g_ema, t_ema, ll, args, ...}`": partial(of_aligner, released=True),
    "`{g_ema, t_ema, ll, classifier, ...}`": partial(of_aligner, released=True, classifier=True),
}  # fmt: skip


def test_the_page_lists_what_is_tested():
    rows = re.findall(r"^\| (.+?) \| .+ \|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(row for row in rows if row != "layout") == sorted(LAYOUTS)


@pytest.mark.filterwarnings("ignore")  # of networks that are one entry of a file
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_back_exactly(layout, tmp_path):
    found, expected = LAYOUTS[layout](tmp_path)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []

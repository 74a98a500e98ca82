"""Readers of files on damaged files: the content, or one line of ValueError or OSError, whatever byte or value is wrong.

HYPOTHESIS_PROFILE=fuzz (`make fuzz`) tries many more files, other ones each time.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from triptych_common.data.decoding import read_image
from triptych_common.metrics.npz import NpzImages
from triptych_common.storage import checkpoint
from triptych_common.storage.run import RunDirectory
from triptych_dit.autoencoder.cache import LatentCache, write_manifest, write_shard
from triptych_dit.config import DiTConfig
from triptych_dit.sample import read_npz, write_npz
from triptych_dit.testing import random_model
from triptych_dit.weights import load_model, save_model
from triptych_gangealing.aligner import Aligner, load_aligner, write_aligner
from triptych_gangealing.config import SpatialTransformerConfig
from triptych_gangealing.modes import Directions, Mode
from triptych_gangealing.spatial_transformer import SpatialTransformer
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.weights import read_network, write_network
from triptych_gpt.config import GptConfig
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.model import Gpt, write_model
from triptych_gpt.tasks.registry import open_task
from triptych_gpt.trained import load
from triptych_gpt.zoo import store
from triptych_gpt.zoo.zoo import Zoo

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, -1, 2**40, "../x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def dit(folder: Path) -> Path:
    config = DiTConfig(
        input_size=(4, 4), patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3
    )
    save_model(folder / "model.safetensors", random_model(config, dtype=torch.float32), {"predict": "noise"})
    return folder / "model.safetensors"


def gpt(folder: Path) -> Path:
    config = GptConfig(open_task("mnist_mlp_14").symmetry, width=8, depth=1, num_heads=1, scalars="raw")
    facts = {
        "scale": 1.0, "metric": "test_loss", "better": "lower", "trained_range": [0.1, 2.0],
        "task": {"task": "mnist_mlp_14", "data": None, "epochs": None},
    }  # fmt: skip
    write_model(folder / "model.safetensors", config, Gpt(config).state_dict(), facts)
    return folder / "model.safetensors"


def aligner(folder: Path) -> Path:
    config = SpatialTransformerConfig(input_size=16, channel_max=4, flow_size=4, flow_upsampling=4)
    mode = Mode(Directions(torch.zeros(4), torch.eye(4)[:1], torch.ones(1)), 1)
    facts = {"padding": "border", "iterations": 1, "flips": False, "generator": "none"}
    write_aligner(folder / "aligner.safetensors", Aligner(SpatialTransformer(config), mode), facts)
    return folder / "aligner.safetensors"


def generator(folder: Path) -> Path:
    network = Generator(
        GeneratorConfig(resolution=8, channel_base=64, channel_max=8, z_dim=8, w_dim=8, mapping_layers=1)
    )
    write_network(folder / "generator.safetensors", network, {"seed": 0})
    return folder / "generator.safetensors"


def sealed(folder: Path) -> Path:
    checkpoint.write(folder / "step-00000001.safetensors", {"a": torch.arange(6.0)}, {"step": 1})
    return folder / "step-00000001.safetensors"


def npz(folder: Path) -> Path:
    write_npz(folder / "samples.npz", [torch.zeros(3, 3, 4, 4, dtype=torch.uint8)], 3)
    return folder / "samples.npz"


def read_as_reference(path: Path) -> None:
    list(NpzImages(path).batches(2))


def picture(kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"a.{kind}")
        return folder / f"a.{kind}"

    return make


def zoo(folder: Path) -> Path:
    layout = ParameterLayout({"weight": (2, 3), "bias": (2,)})
    facts = {
        "task": "tiny", "layout": layout.to_json(), "checkpoints": 3, "dtype": "float32", "metrics": {"loss": "lower"},
        "recipe": {}, "repair": "triptych-gpt collect tiny --repair",
    }  # fmt: skip
    manifest = store.Manifest.create(folder, facts)
    theta, steps = torch.randn(2, 3, layout.size), torch.arange(3).expand(2, 3)
    data = store.CohortData([0, 1], theta, steps, {"loss": torch.rand(2, 3)}, {"split": "train"}, {})
    manifest.commit(store.write_shard(folder, store.shard_name([0, 1]), data))
    return folder / store.MANIFEST


def read_zoo(path: Path) -> None:
    opened = Zoo(path.parent)
    opened.metrics(opened.metric_names[0])
    if len(opened):
        opened.theta(np.array([0]), np.array([0]))
    opened.manifest.remedy()


def latents(folder: Path) -> Path:
    moments = torch.zeros(2, 1, 4, 2, 2, dtype=torch.float16)
    write_shard(folder, 0, moments, torch.zeros(2, dtype=torch.long), torch.arange(2))
    facts = {
        "autoencoder": {},
        "source": {"spec": "x", "class_names": ["zero"]},
        "flips": False,
        "latent_shape": [2, 2, 2],
    }
    write_manifest(folder, 1, facts)
    return folder / "manifest.json"


def read_latents(path: Path) -> None:
    cache = LatentCache(path.parent)
    cache.moments(torch.tensor([0, 1]))
    cache.verify()


def run(folder: Path) -> Path:
    with RunDirectory(folder, {"lr": 1}) as opened:
        opened.log({"step": 1, "loss": 0.5})
    return folder / "config.json"


def read_run(path: Path) -> None:
    with RunDirectory(path.parent, {"lr": 1}) as opened:
        opened.truncate_metrics(1)


DOORS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "dit": (dit, load_model), "gpt": (gpt, load), "aligner": (aligner, load_aligner), "generator": (generator, read_network),
    "checkpoint": (sealed, checkpoint.read), "npz": (npz, read_npz), "reference": (npz, read_as_reference),
    "png": (picture("png"), read_image),
    "jpeg": (picture("jpg"), read_image), "gif": (picture("gif"), read_image), "tiff": (picture("tif"), read_image),
    "webp": (picture("webp"), read_image), "zoo": (zoo, read_zoo), "latents": (latents, read_latents), "run": (run, read_run),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A valid file of each kind, in a folder of its own."""
    made = {}
    for name, (make, read) in DOORS.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = make(folder)
        read(made[name])
    return made


def reads_or_refuses(read: Callable[[Path], Any], path: Path) -> None:
    complaint = None
    try:
        read(path)
    except (ValueError, OSError) as error:
        complaint = str(error)
    if complaint is not None:
        assert "\n" not in complaint, complaint
        assert str(path.parent) in complaint or path.name in complaint, f"{complaint}: names no file"


@given(data=st.data())
@pytest.mark.parametrize("name", DOORS)
def test_damaged_bytes(files, name, data):
    path = files[name]
    targets = sorted(p for p in path.parent.rglob("*") if p.is_file() and not p.name.startswith("."))
    target = data.draw(st.sampled_from(targets))
    whole = target.read_bytes()
    place = data.draw(st.integers(0, max(0, len(whole) - 1)))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
    content = bytearray(whole)
    if kind == "flip" and content:
        content[place] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
    elif kind == "zero":
        content[place : place + 16] = bytes(len(content[place : place + 16]))
    try:
        target.write_bytes(content)
        reads_or_refuses(DOORS[name][1], path)
    finally:
        target.write_bytes(whole)


@given(data=st.data())
@pytest.mark.parametrize("name", ["dit", "gpt", "aligner", "generator", "checkpoint"])
def test_wrong_values_under_a_right_checksum(files, name, data):
    tensors, facts = checkpoint.read(files[name])
    other = files[name].with_name(f"other-{files[name].name}")
    changed = altered(facts, data)
    checkpoint.write(other, tensors, changed if isinstance(changed, dict) else {"state": changed})
    reads_or_refuses(DOORS[name][1], other)
    other.unlink()


@given(data=st.data())
def test_wrong_values_in_a_zoo(files, data):
    whole = files["zoo"].read_text()
    content = json.loads(whole)
    content.pop("xxh3_128")
    content = altered(content, data)
    if isinstance(content, dict):
        records, head = content.get("shards"), {k: v for k, v in content.items() if k != "shards"}
        lines = map(json.dumps, records) if isinstance(records, list) else []
        content["xxh3_128"] = store._digest(head, lines)
    try:
        files["zoo"].write_text(json.dumps(content))
        reads_or_refuses(read_zoo, files["zoo"])
    finally:
        files["zoo"].write_text(whole)


@given(data=st.data())
@pytest.mark.parametrize("name", ["latents", "run"])
def test_wrong_values_in_a_manifest(files, name, data):
    whole = files[name].read_text()
    try:
        files[name].write_text(json.dumps(altered(json.loads(whole), data)))
        reads_or_refuses(DOORS[name][1], files[name])
    finally:
        files[name].write_text(whole)


def altered(tree: Any, data: st.DataObject) -> Any:
    """A JSON tree with one value replaced, removed or added."""
    places = list(nodes(tree))
    place = data.draw(st.sampled_from(places))
    value = data.draw(JSON)
    if not place:
        return value
    copy = json.loads(json.dumps(tree))
    node = copy
    for key in place[:-1]:
        node = node[key]
    if data.draw(st.booleans()):
        node[place[-1]] = value
    elif isinstance(node, dict):
        del node[place[-1]]
        node[data.draw(st.text(max_size=6))] = value
    else:
        node.insert(place[-1], value)
    return copy


def nodes(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from nodes(child, (*place, key))

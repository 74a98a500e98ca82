"""Doors: every kind of foreign file that is read, with a small valid one, its reader, and ways to damage it."""

import importlib.util
import json
import os
import random
import shutil
import struct
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from triptych_common.data import HubImages, ImageFolder
from triptych_common.data.decoding import FORMATS, read_image
from triptych_common.metrics.npz import NpzImages
from triptych_common.storage import checkpoint, foreign
from triptych_common.storage.run import RunDirectory
from triptych_dit.autoencoder.cache import LatentCache, write_manifest, write_shard
from triptych_dit.autoencoder.model import load_autoencoder
from triptych_dit.config import DiTConfig
from triptych_dit.interop import load_any
from triptych_dit.interop.diffusers import to_diffusers
from triptych_dit.sample import read_npz, write_npz
from triptych_dit.testing import random_model, random_vae
from triptych_dit.weights import load_model, save_model
from triptych_gangealing.aligner import Aligner, load_aligner, write_aligner
from triptych_gangealing.config import SpatialTransformerConfig
from triptych_gangealing.keypoints.benchmarks import open_benchmark
from triptych_gangealing.modes import Directions, Mode
from triptych_gangealing.pictures import png_names
from triptych_gangealing.spatial_transformer import SpatialTransformer
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.weights import open_networks, read_network, write_network
from triptych_gpt.config import GptConfig
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.model import Gpt, write_model
from triptych_gpt.settings import ImportConfig
from triptych_gpt.tasks.registry import open_task
from triptych_gpt.trained import load
from triptych_gpt.zoo import store
from triptych_gpt.zoo.lmdb_import import import_lmdb
from triptych_gpt.zoo.zoo import Zoo

PACKAGES = Path(__file__).parent.parent / "packages"


@dataclass(frozen=True)
class Door:
    """make: writes a valid file, or a folder of files, into a folder and returns its path. read: reads it.

    reseal: alters a value in the file's JSON, under a checksum that is right. share: of a campaign's cases; 1 for a quick reader.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    reseal: Callable[[Path, random.Random], None] | None = None
    share: float = 1.0


@cache
def of_tests(package: str, name: str) -> ModuleType:
    """A module of a package's tests, for the files of other programs that it writes."""
    spec = importlib.util.spec_from_file_location(f"doors_{name}", PACKAGES / package / "tests" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- our own files


def small_dit() -> Any:
    config = DiTConfig(
        input_size=(4, 4), patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3
    )
    return random_model(config, dtype=torch.float32)


def dit(folder: Path) -> Path:
    save_model(folder / "model.safetensors", small_dit(), {"predict": "noise"})
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
    write_npz(folder / "samples.npz", [torch.zeros(3, 3, 4, 4, dtype=torch.uint8)], 3, torch.arange(3))
    return folder / "samples.npz"


def statistics(folder: Path) -> Path:
    """Of features with as many numbers as there are, packed: a thousand times smaller than unpacked."""
    arrays = {"mu": np.zeros(2048), "sigma": np.eye(2048, dtype=np.float32)}
    np.savez_compressed(folder / "statistics.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **arrays)
    return folder / "statistics.npz"


def read_as_reference(path: Path) -> None:
    list(NpzImages(path).batches(2))


def zoo(folder: Path) -> Path:
    layout = ParameterLayout({"weight": (2, 3), "bias": (2,)})
    facts = {
        "task": "tiny", "layout": layout.to_json(), "checkpoints": 3, "dtype": "float32", "metrics": {"loss": "lower"},
        "recipe": {}, "repair": "triptych-gpt collect tiny --repair",
    }  # fmt: skip
    manifest = store.Manifest.create(folder, facts)
    theta, steps = torch.randn(2, 3, layout.size), torch.arange(3).expand(2, 3)
    data = store.CohortData([0, 1], theta, steps, {"loss": torch.rand(2, 3)}, {"split": "train", "lr": 0.1}, {})
    manifest.commit(store.write_shard(folder, store.shard_name([0, 1]), data))
    return folder / store.MANIFEST


def read_zoo(path: Path) -> None:
    opened = Zoo(path.parent)
    for name in opened.metric_names[:1]:
        opened.metrics(name)
    if len(opened):
        opened.theta(np.array([0]), np.array([0]))
        opened.index()
    opened.manifest.remedy()


def reseal_zoo(path: Path, rng: random.Random) -> None:
    content = json.loads(path.read_text())
    content.pop("xxh3_128")
    content = altered(content, rng)
    if isinstance(content, dict):
        records, head = content.get("shards"), {k: v for k, v in content.items() if k != "shards"}
        lines = map(json.dumps, records) if isinstance(records, list) else []
        content["xxh3_128"] = store._digest(head, lines)
    path.write_text(json.dumps(content))


def latents(folder: Path) -> Path:
    moments = torch.zeros(2, 1, 4, 2, 2, dtype=torch.float16)
    write_shard(folder, 0, moments, torch.zeros(2, dtype=torch.long), torch.arange(2))
    source, autoencoder = {"spec": "x", "class_names": ["zero"]}, {"spec": "x", "scale_factor": 1.0}
    write_manifest(folder, 1, {"autoencoder": autoencoder, "source": source, "flips": False, "latent_shape": [2, 2, 2]})
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


def reseal_checkpoint(path: Path, rng: random.Random) -> None:
    tensors, facts = checkpoint.read(path)
    changed = altered(facts, rng)
    checkpoint.write(path, tensors, changed if isinstance(changed, dict) else {"state": changed})


def reseal_json(path: Path, rng: random.Random) -> None:
    path.write_text(json.dumps(altered(json.loads(path.read_text()), rng)))


# --- files of other programs


def torch_file(folder: Path, *, zipped: bool) -> Path:
    shared = torch.arange(12.0)
    content = {
        "model": {"a": shared[2:5], "b": shared.view(3, 4).T, "c": torch.nn.Parameter(torch.ones(2).half())},
        "args": Namespace(size=3, names=["x"]), "step": 7, "seen": {1, 2}, "size": torch.Size([1]),
    }  # fmt: skip
    torch.save(content, folder / "a.pt", _use_new_zipfile_serialization=zipped)
    return folder / "a.pt"


def safetensors(folder: Path) -> Path:
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2).half()}, folder / "a.safetensors", {"x": "y"})
    return folder / "a.safetensors"


def nvidia(folder: Path) -> Path:
    theirs = of_tests("gangealing", "test_interop")
    network = Generator(
        GeneratorConfig(resolution=8, channel_base=64, channel_max=8, z_dim=8, w_dim=8, mapping_layers=1)
    )
    options = {"_init_kwargs": theirs.ada_options(network)}
    return theirs.pickled(folder / "a.pkl", {"G_ema": theirs.their(network, **options)})


def tensorflow_era(folder: Path) -> Path:
    theirs = of_tests("gangealing", "test_tensorflow_era")
    return theirs.both(folder / "a.pkl")


def rosinality(folder: Path, *, zipped: bool) -> Path:
    theirs = of_tests("gangealing", "test_rosinality")
    content = {"g_ema": theirs.generator_state(), "d": theirs.discriminator_state()}
    return theirs.saved(folder / "a.pt", content, _use_new_zipfile_serialization=zipped)


def released_aligner(folder: Path) -> Path:
    theirs = of_tests("gangealing", "test_released")
    return theirs.saved(folder / "a.pt", theirs.checkpoint(heads=2, classes=4))


def spair(folder: Path) -> Path:
    """The annotation of a pair; its pictures' lie beside it."""
    theirs = of_tests("gangealing", "test_benchmarks")
    return next((theirs.spair_fixture(folder) / "PairAnnotation/test").glob("*.json"))


def read_networks(path: Path) -> None:
    source = open_networks(path)
    for build in (source.generator, source.discriminator):
        if build is not None:
            build()


def released_dit(folder: Path) -> Path:
    model = small_dit()
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "a.pt")
    return folder / "a.pt"


def diffusers_folder(folder: Path) -> Path:
    to_diffusers(small_dit(), folder / "exported")
    return folder / "exported" / "transformer" / "config.json"


def vae(folder: Path) -> Path:
    random_vae().save_pretrained(folder / "vae")
    return folder / "vae" / "config.json"


def hub_disk(folder: Path) -> Path:
    _table().save_to_disk(folder / "data")
    return folder / "data" / "state.json"


def hub_parquet(folder: Path) -> Path:
    (folder / "data").mkdir()
    _table().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder / "data" / "train-00000-of-00001.parquet"


def _table() -> Any:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(3)]
    return datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 0]}, features=features)


def read_hub(path: Path) -> None:
    images = HubImages(path.parent)
    for i in range(len(images)):
        images.image(i)


def lmdb_runs(folder: Path) -> Path:
    theirs = of_tests("gpt_checkpoints", "test_lmdb_import")
    for name in ("1", "2"):
        theirs.write_run(folder / "data", name)
        (folder / "data" / name / "lock.mdb").unlink()
        with (folder / "data" / name / "data.mdb").open("r+b") as file:
            file.truncate(1 << 15)
    return folder / "data" / "1" / "runs.json"


def read_lmdb(path: Path) -> None:
    data = next(parent for parent in path.parents if parent.name == "data")
    out = data.parent / ".zoo"
    config = ImportConfig(lmdb=data, out=out, num_test_runs=1, checkpoints=4, cohort_runs=4, task="tiny")
    try:
        import_lmdb(config, of_tests("gpt_checkpoints", "test_lmdb_import").LAYOUT)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def picture(kind: str, folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"a.{kind.lower()}", kind)
    return folder / f"a.{kind.lower()}"


def class_names(folder: Path) -> Path:
    (folder / "names.txt").write_bytes(b"cat\ndog, puppy\nn01440764 tench\n\xc3\xa9t\xc3\xa9\n")
    return folder / "names.txt"


def read_class_names(path: Path) -> None:
    """A folder of pictures in folders of these names."""
    root = path.parent / ".pictures"
    shutil.rmtree(root, ignore_errors=True)
    for name in {line for line in path.read_bytes().split(b"\n")[:20] if line.strip(b".") and len(line) < 256}:
        if not set(name) & set(b"/\0"):
            place = Path(os.fsdecode(name))
            (root / place).mkdir(parents=True)
            Image.new("L", (2, 2)).save(root / place / "a.png")
    if root.exists():
        images = ImageFolder(root)
        png_names(images.files)
        "".join(images.class_names).encode()
        images.fingerprint()
        images.image(len(images) - 1)


_SEALED = {"reseal": reseal_checkpoint}
DOORS = {
    "dit": Door(dit, load_model, **_SEALED), "gpt": Door(gpt, load, **_SEALED),
    "aligner": Door(aligner, load_aligner, **_SEALED), "generator": Door(generator, read_network, **_SEALED),
    "checkpoint": Door(sealed, checkpoint.read, **_SEALED), "npz": Door(npz, read_npz),
    "reference": Door(statistics, read_as_reference, share=0.05),
    "zoo": Door(zoo, read_zoo, reseal_zoo), "latents": Door(latents, read_latents, reseal_json),
    "run": Door(run, read_run, reseal_json),
    "torch zip": Door(partial(torch_file, zipped=True), foreign.read),
    "torch legacy": Door(partial(torch_file, zipped=False), foreign.read),
    "safetensors": Door(safetensors, foreign.read), "nvidia pickle": Door(nvidia, read_networks, share=0.5),
    "tensorflow pickle": Door(tensorflow_era, read_networks, share=0.2),
    "rosinality zip": Door(partial(rosinality, zipped=True), read_networks, share=0.2),
    "rosinality legacy": Door(partial(rosinality, zipped=False), read_networks, share=0.2),
    "released aligner": Door(released_aligner, load_aligner, share=0.2),
    "spair": Door(spair, lambda path: open_benchmark(f"spair:{path.parents[2]}", "cat"), reseal_json, share=0.2),
    "released dit": Door(released_dit, partial(load_any, num_heads=2, num_classes=3), share=0.5),
    "diffusers": Door(diffusers_folder, lambda path: load_any(path.parent.parent), reseal_json, share=0.5),
    "vae": Door(vae, lambda path: load_autoencoder(str(path.parent)), reseal_json, share=0.05),
    "hub folder": Door(hub_disk, read_hub, reseal_json, share=0.05), "hub parquet": Door(hub_parquet, read_hub, share=0.02),
    "lmdb": Door(lmdb_runs, read_lmdb, reseal_json, share=0.1), "class names": Door(class_names, read_class_names, share=0.5),
    **{kind.lower(): Door(partial(picture, kind), read_image) for kind in FORMATS},
}  # fmt: skip


# --- damage


NUMBERS = (0, -1, 1, 255, 65536, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**64, 10**30)
TOKENS = (
    *map(str, NUMBERS), "1e308", "-1e-400", "NaN", "Infinity", "null", "true", "{}", "[]", "[" * 300, '"../../x"', '""',
    '"\\ud800"', '"\\u001b[2J"', '"__class__"', ",", "}", "]", ":", "/dev/zero",
)  # fmt: skip
VALUES = (*NUMBERS, 0.5, -2.5, 1e308, None, True, "", "../x", "\x1b[2J", "x" * 300, [], {}, [[]], {"a": 1}, [0, "a"])


def damage(door: Door, folder: Path, path: Path, rng: random.Random, others: list[Path]) -> Callable[[], object]:
    """Damage one of a door's files; returns a function that restores it.

    folder, path: where they are, and what `make` returned. others: files whose pieces may be spliced in.
    """
    if door.reseal is not None and rng.random() < 0.4:
        target, whole = path, path.read_bytes()
        door.reseal(path, rng)
    else:
        target = rng.choice(files_in(folder))
        whole = target.read_bytes()
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            rng.choice(DAMAGES)(content, rng, others)
        target.write_bytes(content)
    return partial(target.write_bytes, whole)


def files_in(folder: Path) -> list[Path]:
    """A door's files, without what readers leave behind."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def flip(content: bytearray, rng: random.Random, others: list[Path]) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def cut(content: bytearray, rng: random.Random, others: list[Path]) -> None:
    del content[rng.randrange(len(content) + 1) :]


def remove(content: bytearray, rng: random.Random, others: list[Path]) -> None:
    start = rng.randrange(len(content) + 1)
    del content[start : start + rng.choice((1, 4, 64))]


def insert(content: bytearray, rng: random.Random, others: list[Path]) -> None:
    at = rng.randrange(len(content) + 1)
    content[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))


def fill(content: bytearray, rng: random.Random, others: list[Path]) -> None:
    at, byte = rng.randrange(len(content) + 1), rng.choice((b"\0", b"\xff", b" ", b"9"))
    span = len(content[at : at + rng.choice((4, 16, 256))])
    content[at : at + span] = byte * span


def number(content: bytearray, rng: random.Random, others: list[Path]) -> None:
    """A binary number in place of one."""
    if len(content) > 8:
        at, form = rng.randrange(len(content) - 8), rng.choice(("<I", ">I", "<Q", ">Q", "<H"))
        bits = 8 * struct.calcsize(form)
        packed = struct.pack(form, rng.choice(NUMBERS) % (1 << bits))
        content[at : at + len(packed)] = packed


def token(content: bytearray, rng: random.Random, others: list[Path]) -> None:
    """A piece of JSON at a random place, or in place of a number."""
    digits = [i for i in range(len(content) - 1) if 48 <= content[i] < 58 and content[i - 1] in b' :[,"'][:200]
    at = rng.choice(digits) if digits and rng.random() < 0.7 else rng.randrange(len(content) + 1)
    end = at
    while end < len(content) and 48 <= content[end] < 58:
        end += 1
    content[at:end] = rng.choice(TOKENS).encode()


def repeat(content: bytearray, rng: random.Random, others: list[Path]) -> None:
    at = rng.randrange(len(content) + 1)
    piece = content[at : at + rng.choice((1, 2, 16, 256))]
    content[at:at] = piece * rng.choice((1, 3, 100, 1000))


def splice(content: bytearray, rng: random.Random, others: list[Path]) -> None:
    """A piece of the same file, or of another kind of file, over or between what is there."""
    source = content if not others or rng.random() < 0.6 else rng.choice(others).read_bytes()
    start, at, size = rng.randrange(len(source) + 1), rng.randrange(len(content) + 1), rng.choice((4, 32, 512))
    piece = bytes(source[start : start + size])
    content[at : at + rng.choice((0, len(piece)))] = piece


DAMAGES = (flip, flip, flip, cut, remove, insert, fill, number, number, token, token, repeat, splice, splice)


def altered(tree: Any, rng: random.Random) -> Any:
    """A JSON tree with one value replaced, removed or added."""
    places = list(nodes(tree))
    place, value = rng.choice(places), rng.choice(VALUES)
    if not place:
        return value if rng.random() < 0.1 else altered(tree, rng) if len(places) > 1 else value
    copy = json.loads(json.dumps(tree))
    node = copy
    for key in place[:-1]:
        node = node[key]
    if rng.random() < 0.7:
        node[place[-1]] = value
    elif isinstance(node, dict):
        del node[place[-1]]
        node[rng.choice(("", "x", "__class__", "0"))] = value
    else:
        node.insert(place[-1], value)
    return copy


def nodes(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from nodes(child, (*place, key))


def complaint(door: Door, folder: Path, path: Path) -> str | None:
    """None if the file is read, or the line by which it is refused. Raises AssertionError unless that is one and names a file."""
    try:
        door.read(path)
    except (ValueError, OSError) as error:
        line = str(error)
        assert "\n" not in line, line
        assert str(folder) in line or path.name in line, f"{line}: names no file"
        return line
    return None

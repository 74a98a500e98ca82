"""Files of the released DiT: read exactly, written as the original code reads them, refused in one line."""

import argparse
import hashlib
import http.server
import pathlib
import threading
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from triptych_dit import PRESETS, DiT, DiTConfig, load_released
from triptych_dit.interop import export_released, load_any, released
from triptych_dit.weights import LatentSpace, save_model

WIDTH, DEPTH, CLASSES = 384, 2, 7
SMALL = DiTConfig((8, 8), 4, patch_size=2, hidden_size=WIDTH, depth=DEPTH, num_heads=6, num_classes=CLASSES)
ARGS = argparse.Namespace(model="DiT-S/2", image_size=256, num_classes=CLASSES, vae="ema")


def published_shapes(width, depth, side, patch=2, channels=4, rows=1001, hidden=None):
    """Names and shapes of the original's state dict, written down from its description."""
    hidden = hidden or 4 * width
    linears = {
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch * patch * 2 * channels, width), "final_layer.adaLN_modulation.1": (2 * width, width),
    }  # fmt: skip
    for i in range(depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (hidden, width), f"blocks.{i}.mlp.fc2": (width, hidden),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }  # fmt: skip
    shapes = {"pos_embed": (1, (side // patch) ** 2, width), "y_embedder.embedding_table.weight": (rows, width)}
    shapes |= {"x_embedder.proj.weight": (width, channels, patch, patch), "x_embedder.proj.bias": (width,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def released_state(config=SMALL, seed=0):
    """Random weights under the original's names, with the true position embedding."""
    rng = torch.Generator().manual_seed(seed)
    shapes = published_shapes(
        config.hidden_size, config.depth, config.input_size[0], rows=config.num_classes + 1, channels=config.in_channels
    )
    state = {name: torch.randn(shape, generator=rng) * 0.05 for name, shape in shapes.items()}
    return state | {"pos_embed": DiT(config).pos_embed.detach().clone()}


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def assert_holds(model, state):
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    assert [name for name in state if not torch.equal(ours[name], state[name].float())] == []


def test_xl_2_holds_the_292_published_tensors():
    for preset, side in (("DiT-XL/2", 32), ("DiT-XL/2@512", 64)):
        with torch.device("meta"):
            ours = DiT(PRESETS[preset]).state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == published_shapes(1152, 28, side)
        assert len(ours) == 292
        assert released.infer_config(ours, num_heads=None, num_classes=1000) == PRESETS[preset]


@pytest.mark.parametrize(
    "preset", [name for name, row in PRESETS.items() if row == replace(row, block_design="adaln_zero")]
)
def test_every_published_shape_is_inferred(preset):
    with torch.device("meta"):
        state = DiT(PRESETS[preset]).state_dict()
    heads = None if preset.startswith("DiT-") else 2
    assert released.infer_config(state, num_heads=heads, num_classes=PRESETS[preset].num_classes) == PRESETS[preset]


@pytest.mark.parametrize("form", ["bare", "training", "legacy", "wrapped", "half", "safetensors"])
def test_a_released_file_is_read_exactly(tmp_path, form):
    state = released_state()
    path = tmp_path / "file.pt"
    if form == "bare":
        saved(path, state)
    elif form == "training":
        other = released_state(seed=1)
        saved(path, {"model": other, "ema": state, "opt": {"state": {0: {"step": torch.tensor(3.0)}}}, "args": ARGS})
        assert_holds(load_released(path, weights="model"), other)
    elif form == "legacy":
        saved(path, state, _use_new_zipfile_serialization=False)
    elif form == "wrapped":
        names = {name: name.replace("blocks.1.", "blocks.1._orig_mod._checkpoint_wrapped_module.") for name in state}
        beside = {"out": pathlib.Path("runs/a"), "best": np.float64(3.0), "numpy": np.random.get_state()}
        saved(path, {"state_dict": {f"net.module.{names[name]}": tensor for name, tensor in state.items()}, **beside})
    elif form == "half":
        state = {name: tensor if name == "pos_embed" else tensor.half() for name, tensor in state.items()}
        saved(path, state)
    else:
        path = tmp_path / "file.safetensors"
        save_file(state, path)
    model = load_released(path)
    assert_holds(model, state)
    assert model.config == SMALL
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_models_own_memory_is_not_the_file(tmp_path):
    path = saved(tmp_path / "file.pt", released_state())
    model = load_released(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # in place: a mapping would see it
    assert_holds(model, released_state())


def test_classes_and_heads_come_from_args_options_or_the_rule(tmp_path):
    bare = saved(tmp_path / "bare.pt", released_state())
    assert load_released(bare).config.null_label == CLASSES
    config = load_released(bare, num_classes=CLASSES + 1, num_heads=8).config
    assert (config.num_classes, config.null_label, config.num_heads) == (CLASSES + 1, None, 8)
    without = saved(
        tmp_path / "args.pt", {"ema": released_state(), "args": argparse.Namespace(num_classes=CLASSES + 1)}
    )
    assert load_released(without).config.null_label is None
    narrow = replace(SMALL, hidden_size=16, num_heads=2)
    odd = saved(tmp_path / "odd.pt", released_state(narrow))
    assert load_released(odd, num_heads=2).config == narrow
    with pytest.raises(
        ValueError, match=r"hidden_size 16 is none of the published \(384, 768, 1024, 1152\): pass num_heads"
    ):
        load_released(odd)


@pytest.mark.parametrize("classes", [CLASSES, 0])
def test_export_is_what_the_original_reads_and_comes_back(tmp_path, classes):
    config = replace(SMALL, num_classes=classes)
    model = DiT(config).double()  # written as float32 all the same
    path = tmp_path / "new" / "model.pt"
    export_released(model, path)
    content = torch.load(path, weights_only=True)["ema"]  # which their find_model takes
    assert {name: tuple(tensor.shape) for name, tensor in content.items()} == published_shapes(
        WIDTH, 2, 8, rows=classes + 1
    )
    assert {(tensor.dtype, tensor.is_contiguous()) for tensor in content.values()} == {(torch.float32, True)}
    back = load_released(path)
    assert back.config == config
    assert_holds(back, model.float().state_dict())


def test_what_a_model_means_goes_along_and_comes_back(tmp_path):
    space = LatentSpace("elsewhere", 0.3, latents_mean=(0.0, 1.0, 2.0, 3.0), sha256="a" * 64)
    facts = {
        "predict": "sample",
        "autoencoder": space.facts(),
        "class_names": ["cat", "dog"],
        "data": "photos",
        "kind": "DiT",
    }
    save_model(tmp_path / "model.safetensors", DiT(SMALL), facts)
    export_released(DiT(SMALL), tmp_path / "model.pt", load_any(tmp_path / "model.safetensors").facts)
    back = load_any(tmp_path / "model.pt")
    assert (back.diffusion.predict, back.space, back.class_names) == ("sample", space, ("cat", "dog"))
    assert back.facts["data"] == "photos"
    with pytest.raises(ValueError, match="predicts the sample, as its files say; leave --predict noise out"):
        load_any(tmp_path / "model.pt", predict="noise")
    bare = saved(tmp_path / "bare.pt", released_state())
    assert load_any(bare).diffusion.predict == "noise"
    assert load_any(bare, predict="sample").diffusion.predict == "sample"
    saved(tmp_path / "wrong.pt", {"ema": released_state(), "triptych": {"predict": "velocity"}})
    with pytest.raises(ValueError, match=r"wrong.pt: triptych: predict: 'velocity'.*; export it again"):
        load_any(tmp_path / "wrong.pt")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_accelerate_or_a_trainer_is_read_as_its_file(tmp_path, name):
    (save_file if name.endswith("safetensors") else torch.save)(released_state(), tmp_path / name)
    (tmp_path / "optimizer.bin").write_bytes(b"")
    assert_holds(load_any(tmp_path).model, released_state())


def test_an_unconditional_table_is_folded_into_the_timestep(tmp_path):
    """A single row that is not zero, as their code would train it, still counts."""
    state = released_state(replace(SMALL, num_classes=0))
    model = load_released(saved(tmp_path / "file.pt", state)).double()
    conditional = load_released(tmp_path / "file.pt", num_classes=1).double()
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3, 900])
    expected = conditional(x, t, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(model(x, t), expected, rtol=0, atol=1e-6)  # the sum is rounded to float32


def test_another_position_embedding_is_kept_and_reported(tmp_path, capsys):
    state = released_state()
    state["pos_embed"] = state["pos_embed"] + 0.25
    assert_holds(load_released(saved(tmp_path / "file.pt", state)), state)
    assert "not the sine-cosine one (differs by up to 0.25); kept" in capsys.readouterr().out


def test_a_missing_position_embedding_is_computed(tmp_path, capsys):
    state = released_state()
    trained = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
    assert_holds(load_released(saved(tmp_path / "bare.pt", trained), input_size=8), state)
    assert "has no position embedding; computed for 16 tokens, as --input-size sets" in capsys.readouterr().out
    args = {"image_size": 64, "model": ["not a name"], "num_classes": CLASSES}
    assert_holds(load_released(saved(tmp_path / "run.pt", {"ema": trained, "args": args})), state)
    assert load_released(tmp_path / "bare.pt").config.input_size == (32, 32)
    with pytest.raises(ValueError, match="input_size 9: expected a multiple of its patch size, 2"):
        load_released(tmp_path / "bare.pt", input_size=9)


def without(name):
    return {key: tensor for key, tensor in released_state().items() if key != name}


FOREIGN = {
    "a diffusers transformer": ({"transformer_blocks.0.norm1.emb.x": torch.ones(1)}, "transformer of a diffusers DiT"),
    "a UNet": ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, "looks like a UNet"),
    "a Lightning UNet": ({"state_dict": {"input_blocks.0.weight": torch.ones(1)}}, "looks like a UNet"),
    "an autoencoder": ({"encoder.conv_in.weight": torch.ones(1)}, "an autoencoder, which belongs to --vae"),
    "MDT": ({**released_state(), "blocks.0.attn.rel_pos_bias.t": torch.ones(1)}, "looks like an MDT"),
    "REPA": ({"ema": {**released_state(), "projectors.0.0.weight": torch.ones(1)}}, "a SiT trained with REPA"),
    "SiT": ({"ema": released_state(), "args": argparse.Namespace(path_type="Linear")}, "a SiT, which predicts velocities"),
    "something else": ({"layer.weight": torch.ones(1)}, "missing: x_embedder.proj.weight, .* and 1 others; it holds: layer.weight"),
    "no tensors": ({"epoch": 3}, "it holds: no tensors"),
    "a list": ([torch.ones(1)], "holds a list, expected a state dict"),
    "a missing tensor": (without("blocks.1.attn.qkv.bias"), r"\(32 expected\): missing: blocks.1.attn.qkv.bias"),
    "a surplus one": ({**released_state(), "extra": torch.ones(1)}, "unexpected: extra"),
    "another shape": (
        {**released_state(), "blocks.1.attn.proj.bias": torch.ones(5)},
        r"of another shape: blocks.1.attn.proj.bias \(5,\) for \(384,\)",
    ),
    "a rectangle": ({**released_state(), "pos_embed": torch.ones(1, 15, WIDTH)}, "15 tokens, which is no square"),
    "flat patches": ({**released_state(), "x_embedder.proj.weight": torch.ones(WIDTH, 16)}, "expected 4 axes"),
    "odd channels": ({**released_state(), "final_layer.linear.weight": torch.ones(20, WIDTH)}, "5 output channels for 4"),
    "a function": ({"model": released_state(), "hook": print}, "builtins.print.*may run code"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused_in_one_line(tmp_path, name):
    content, message = FOREIGN[name]
    path = saved(tmp_path / "file.pt", content)
    with pytest.raises(ValueError, match=message) as refused:
        load_released(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_other_wrong_inputs_are_refused_in_one_line(tmp_path):
    path = saved(tmp_path / "file.pt", released_state())
    save_model(tmp_path / "ours.safetensors", DiT(SMALL), {"predict": "noise"})
    (tmp_path / "short.pt").write_bytes(path.read_bytes()[:100_000])
    (tmp_path / "text.pt").write_text("not found")
    saved(tmp_path / "SiT-XL-2-256.pt", released_state())
    cases = [
        ("ours.safetensors", {}, "of triptych's own"), ("short.pt", {}, "truncated"), ("text.pt", {}, "truncated, or neither"),
        ("SiT-XL-2-256.pt", {}, "a SiT"), ("file.pt", {"num_classes": 12}, "num_classes 12: the label table has 8 rows"),
        ("file.pt", {"weights": "ema"}, "a bare state dict"), ("file.pt", {"weights": "opt"}, "expected 'ema' or 'model'"),
        ("file.pt", {"num_heads": 5}, "multiple of 4 and of num_heads"),
    ]  # fmt: skip
    for file, options, message in cases:
        with pytest.raises(ValueError, match=message):
            load_released(tmp_path / file, **options)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_released(tmp_path / "absent.pt")
    saved(tmp_path / "model.pt", {"model": released_state()})
    with pytest.raises(ValueError, match="has no weights 'ema', only model"):
        load_released(tmp_path / "model.pt", weights="ema")


@pytest.mark.parametrize(("change", "message"), [
    ({"block_design": "adaln"}, "block_design adaln: the released code knows only adaln_zero"),
    ({"timestep_frequency_shift": 1}, "timestep_frequency_shift 1"),
    ({"mlp_norm_eps": 1e-5}, "mlp_norm_eps 1e-05"),
    ({"input_size": (8, 16)}, "input_size 8x16: the released code knows only squares"),
])  # fmt: skip
def test_what_the_original_cannot_run_is_not_exported(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        export_released(DiT(replace(SMALL, **change)), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


class _Server(http.server.BaseHTTPRequestHandler):
    content: ClassVar[bytes] = b""
    ranges: ClassVar[list] = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A published name whose file is on a server of this machine; returns its entry."""
    export_released(DiT(SMALL), tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    monkeypatch.setenv("TRIPTYCH_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(_Server, "content", content)
    monkeypatch.setattr(_Server, "ranges", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x.pt"
        entry = released.Published("x.pt", url, SMALL, len(content), hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(released.PUBLISHED, "DiT-X", entry)
        yield entry
        server.shutdown()


def test_a_published_name_is_fetched_once_resumed_and_checked(offered, tmp_path):
    cached = tmp_path / "cache" / "dit" / "x.pt"
    cached.parent.mkdir(parents=True)
    cached.with_name("x.pt.part").write_bytes(_Server.content[:1000])
    assert load_released("DiT-X").config == SMALL
    trained = load_any("DiT-X")
    assert _Server.ranges == ["bytes=1000-"]
    assert trained.diffusion.variance == "learned_range"
    assert trained.facts["autoencoder"]["spec"] == "stabilityai/sd-vae-ft-ema"
    spoiled = bytearray(_Server.content)
    spoiled[-2000] ^= 1
    cached.write_bytes(spoiled)
    with pytest.raises(ValueError, match=r"SHA-256 .* expected .*; delete the file and repeat"):
        load_released("DiT-X")
    cached.write_bytes(_Server.content[:-1])
    with pytest.raises(ValueError, match="bytes, expected"):
        load_released("DiT-X")


def test_a_file_without_published_size_must_at_least_hold_the_weights(offered, tmp_path, monkeypatch):
    monkeypatch.setitem(released.PUBLISHED, "DiT-X", offered._replace(size=None, sha256=None))
    assert load_released("DiT-X").config == SMALL
    monkeypatch.setitem(
        released.PUBLISHED, "DiT-X", offered._replace(size=None, sha256=None, config=replace(SMALL, depth=3))
    )
    with pytest.raises(ValueError, match="bytes, expected 34,200,704"):
        load_released("DiT-X")


def test_offline_the_error_names_the_address_and_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_DATA", str(tmp_path))
    entry = released.PUBLISHED["DiT-XL/2@512"]._replace(url="http://127.0.0.1:9/DiT-XL-2-512x512.pt")
    monkeypatch.setitem(released.PUBLISHED, "DiT-XL/2@512", entry)
    with pytest.raises(FileNotFoundError) as refused:
        load_released("DiT-XL/2@512")
    message = str(refused.value)
    assert str(tmp_path / "dit" / "DiT-XL-2-512x512.pt") in message
    assert "http://127.0.0.1:9/DiT-XL-2-512x512.pt cannot be fetched" in message
    assert "\n" not in message

"""`convert`: what it writes computes what the source does; what it finds, refuses and replaces."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from triptych_common.cli import Command, main
from triptych_common.storage import checkpoint
from triptych_common.testing import run_here
from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.convert import ConvertConfig, convert
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.rosinality import to_rosinality
from triptych_gangealing.stylegan2.weights import load_discriminator, load_generator, write_network

SHAPE = {"resolution": 8, "channel_base": 96, "channel_max": 12}


def networks(seed: int = 0, **options) -> tuple[Generator, Discriminator]:
    torch.manual_seed(seed)
    generator = Generator(GeneratorConfig(**SHAPE, z_dim=20, w_dim=20, mapping_layers=2, **options))
    for name, value in generator.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(value, 0.3)
    return generator, Discriminator(DiscriminatorConfig(**SHAPE))


def source(path: Path, *, with_discriminator: bool = True, seed: int = 0) -> Path:
    generator, discriminator = networks(seed)
    torch.save(to_rosinality(generator, discriminator if with_discriminator else None), path)
    return path


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_files_of_ours_record_their_source(tmp_path):
    result = convert(ConvertConfig(checkpoint=source(tmp_path / "a.pt"), out=tmp_path / "out"))
    generator, discriminator = networks()
    assert same(load_generator(tmp_path / "out"), generator)
    assert same(load_discriminator(tmp_path / "out"), discriminator)
    assert result["format"] == "rosinality"
    assert result["found"]["generator"]["num_ws"] == 4
    assert result["found"]["generator"]["parameters"] == sum(p.numel() for p in generator.parameters())
    assert all(0 < value < 1e-4 for value in result["difference"].values())
    _, facts = checkpoint.read(tmp_path / "out" / "generator.safetensors")
    assert facts["converted_from"] == "a.pt"
    assert len(facts["source_sha256"]) == 64
    assert facts["difference"] == result["difference"]["generator"]


def test_round_trip_through_every_format_is_exact(tmp_path):
    convert(ConvertConfig(checkpoint=source(tmp_path / "a.pt"), out=tmp_path / "ours"))
    convert(ConvertConfig(checkpoint=tmp_path / "ours", out=tmp_path / "b.pt", format="rosinality"))
    convert(ConvertConfig(checkpoint=tmp_path / "b.pt", out=tmp_path / "again"))
    generator, discriminator = networks()
    assert same(load_generator(tmp_path / "again"), generator)
    assert same(load_discriminator(tmp_path / "again"), discriminator)
    before, after = torch.load(tmp_path / "a.pt", weights_only=True), torch.load(tmp_path / "b.pt", weights_only=True)
    for key in ("g_ema", "d"):
        assert before[key].keys() == after[key].keys()
        assert all(torch.equal(value, after[key][name]) for name, value in before[key].items())


def test_one_file_holds_the_generator_alone(tmp_path):
    result = convert(ConvertConfig(checkpoint=source(tmp_path / "a.pt"), out=tmp_path / "g.safetensors"))
    assert result["written"] == [str(tmp_path / "g.safetensors")]
    assert same(load_generator(tmp_path / "g.safetensors"), networks()[0])


def test_a_conversion_replaces_a_conversion_whole(tmp_path):
    out = tmp_path / "out"
    convert(ConvertConfig(checkpoint=source(tmp_path / "a.pt"), out=out))
    convert(ConvertConfig(checkpoint=source(tmp_path / "b.pt", with_discriminator=False, seed=1), out=out))
    assert same(load_generator(out), networks(1)[0])
    assert not (out / "discriminator.safetensors").exists()  # the other generator's
    for _ in range(2):
        convert(ConvertConfig(checkpoint=tmp_path / "a.pt", out=out, format="rosinality"))
    assert same(load_generator(out / "stylegan2.pt"), networks()[0])


@pytest.mark.parametrize("name", ["generator.safetensors", "discriminator.safetensors"])
def test_a_trained_network_is_not_replaced(tmp_path, name):
    out = tmp_path / "run"
    write_network(out / name, networks(7)["discriminator" in name], {"images": 100})
    before = (out / name).read_bytes()
    with pytest.raises(ValueError, match=rf"{name}: already there, and no conversion made it"):
        convert(ConvertConfig(checkpoint=source(tmp_path / "a.pt"), out=out))
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_bytes() == before


def test_nothing_is_written_where_outputs_differ(tmp_path, monkeypatch):
    monkeypatch.setattr("triptych_gangealing.stylegan2.convert._TOLERANCE", 1e-12)
    for kind in ("safetensors", "rosinality"):
        with pytest.raises(ValueError, match="more than rounding"):
            convert(ConvertConfig(checkpoint=source(tmp_path / "a.pt"), out=tmp_path / "out", format=kind))
    assert not (tmp_path / "out").exists()


def test_a_bound_on_activations_that_matters_is_not_lost_silently(tmp_path):
    """Theirs has none: at 256 it changes nothing, at a half it does."""
    for clamp in (256.0, 0.5):
        write_network(tmp_path / f"{clamp}.safetensors", networks(conv_clamp=clamp)[0], {})
    config = {"format": "rosinality", "out": tmp_path / "out"}
    convert(ConvertConfig(checkpoint=tmp_path / "256.0.safetensors", **config))
    with pytest.raises(ValueError, match="more than rounding"):
        convert(ConvertConfig(checkpoint=tmp_path / "0.5.safetensors", **config))


def command_line(*words: object):
    commands = {"convert": Command("", ConvertConfig, convert, writes="file")}
    return run_here(lambda argv: main("triptych-gangealing", commands, argv), "convert", *words)


def test_the_command_prints_what_it_found(tmp_path):
    done = command_line("--checkpoint", source(tmp_path / "a.pt"), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "generator: 3x8x8, skip design, 12 to 12 feature maps" in done.stdout
    assert "4 w's, unconditional" in done.stdout
    assert "generator: outputs differ from a plain forward pass of the source's tensors by" in done.stdout
    done = command_line(
        "--checkpoint", tmp_path / "out", "--out", tmp_path / "b.pt", "--format", "rosinality", "--json"
    )
    assert json.loads(done.stdout.splitlines()[-1])["written"] == [str(tmp_path / "b.pt")]
    assert "edit `channels` in its model.py" in done.stderr


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def test_what_cannot_be_converted_is_one_line(tmp_path):
    def line(*words):
        done = command_line(*words, "--out", tmp_path / "out")
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        return done.stderr

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"G_ema": Malicious(tmp_path / "witness")}))
    assert "a.pkl: names posix.system" in line("--checkpoint", tmp_path / "a.pkl")
    assert not (tmp_path / "witness").exists()
    assert "no checkpoint" in line()
    assert "no such file" in line("--checkpoint", tmp_path / "none.pkl")
    write_network(tmp_path / "d.safetensors", networks()[1], {})
    assert "holds no generator" in line("--checkpoint", tmp_path / "d.safetensors", "--format", "rosinality")
    write_network(tmp_path / "g.safetensors", networks(c_dim=2)[0], {})
    assert "c_dim 2" in line("--checkpoint", tmp_path / "g.safetensors", "--format", "rosinality")


def test_names_that_do_not_fit_the_format_are_refused():
    with pytest.raises(ValueError, match="not a file of format safetensors"):
        ConvertConfig(out=Path("a.pt"))
    with pytest.raises(ValueError, match="not a file of format rosinality"):
        ConvertConfig(out=Path("a.safetensors"), format="rosinality")


def test_a_discriminator_that_cannot_be_read_may_be_left_out(tmp_path):
    generator, discriminator = networks()
    content = to_rosinality(generator, discriminator)
    content["d"]["b"] = content["d"].pop("final_linear.1.bias")
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"lacks final_linear\.1\.bias; --generator-only leaves the discriminator out"):
        convert(ConvertConfig(checkpoint=tmp_path / "a.pt", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    convert(ConvertConfig(checkpoint=tmp_path / "a.pt", out=tmp_path / "out", generator_only=True))
    assert same(load_generator(tmp_path / "out"), generator)

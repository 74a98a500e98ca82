"""Released checkpoints: the same outputs as a forward pass written out here on the file's own names, or one clear line."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from triptych_gpt.config import GptConfig
from triptych_gpt.convert import convert
from triptych_gpt.interop import RELEASED, export_released, load_released
from triptych_gpt.model import Gpt
from triptych_gpt.presets import PRESETS
from triptych_gpt.settings import ConvertConfig
from triptych_gpt.trained import load

SPEC = PRESETS["cartpole"].symmetry
SPLITS = {"layer": [1, 128, 32, 1024, 32, 32, 1], "chunk": [1, 100, 28, 32, *[100] * 10, 24, 32, 32, 1]}
WIDTH, DEPTH, HEADS, N = 24, 2, 3, 4

pytestmark = pytest.mark.filterwarnings("ignore:tokens of up to")


def config(tokenizer: str = "layer", width: int = WIDTH, factor: float = 1.0) -> GptConfig:
    chunk = 100 if tokenizer == "chunk" else None
    return GptConfig(SPEC, tokenizer, chunk, width, DEPTH, HEADS, scalars="raw", metric_factor=factor)


def released_state(tokenizer: str = "layer", seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict in the released layout; no tensor is zero."""
    sizes = SPLITS[tokenizer]
    inputs = [*sizes, *sizes, *[257] * 4]
    shapes = {"decoder.pos_emb": (1, len(inputs), WIDTH)}
    for i in range(DEPTH):
        block = f"decoder.blocks.{i}"
        for ln in ("ln1", "ln2"):
            shapes |= {f"{block}.{ln}.weight": (WIDTH,), f"{block}.{ln}.bias": (WIDTH,)}
        layers = {f"attn.{layer}": (WIDTH, WIDTH) for layer in ("key", "query", "value", "proj")}
        for layer, (out, into) in {**layers, "mlp.0": (4 * WIDTH, WIDTH), "mlp.2": (WIDTH, 4 * WIDTH)}.items():
            shapes |= {f"{block}.{layer}.weight": (out, into), f"{block}.{layer}.bias": (out,)}
    shapes |= {f"decoder.input_parameter_projections.{i}.0.weight": (WIDTH, size) for i, size in enumerate(inputs)}
    for ln in ("ln_in", "ln_f"):
        shapes |= {f"decoder.{ln}.weight": (WIDTH,), f"decoder.{ln}.bias": (WIDTH,)}
    shapes |= {f"decoder.output_parameter_projections.{i}.0.weight": (size, WIDTH) for i, size in enumerate(sizes)}
    rng = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=rng) * 0.2 for name, shape in shapes.items()}
    return {**state, "scalar_embedder.frequencies": 2 ** torch.linspace(0, 14, 128)}


def reference(state, tokenizer, noised, t, theta, metric, target):
    """The released model's forward pass, token by token and head by head, in float64."""
    state = {name.removeprefix("decoder."): x.double() for name, x in state.items()}

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]
            + state[f"{name}.bias"]
        )

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def scalar(x):
        angles = x[:, None] * state["scalar_embedder.frequencies"]
        return torch.cat([angles.sin(), angles.cos(), x[:, None]], dim=1)

    sizes = SPLITS[tokenizer]
    inputs = [
        *noised.split(sizes, 1),
        *theta.split(sizes, 1),
        *map(scalar, (t.double(), target - metric, target, metric)),
    ]
    tokens = [x @ state[f"input_parameter_projections.{i}.0.weight"].T for i, x in enumerate(inputs)]
    x = norm("ln_in", torch.stack(tokens, 1)) + state["pos_emb"]
    for i in range(DEPTH):
        y = norm(f"blocks.{i}.ln1", x)
        q, k, v = (linear(f"blocks.{i}.attn.{name}", y).chunk(HEADS, dim=-1) for name in ("query", "key", "value"))
        heads = [((a @ b.mT) / (WIDTH / HEADS) ** 0.5).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
        x = x + linear(f"blocks.{i}.attn.proj", torch.cat(heads, -1))
        y = linear(f"blocks.{i}.mlp.0", norm(f"blocks.{i}.ln2", x))
        x = x + linear(f"blocks.{i}.mlp.2", y * 0.5 * (1 + torch.erf(y / 2**0.5)))
    x = norm("ln_f", x)
    outputs = [x[:, i] @ state[f"output_parameter_projections.{i}.0.weight"].T for i in range(len(sizes))]
    return theta + torch.cat(outputs, 1)


def random_inputs() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    noised, theta = torch.randn(2, N, 1250, generator=rng, dtype=torch.float64)
    metric, target = torch.rand(2, N, generator=rng, dtype=torch.float64) * 2
    return {
        "noised": noised, "t": torch.tensor([0, 1, 500, 999]), "theta": theta, "metric": metric, "target": target
    }  # fmt: skip


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("tokenizer", ["layer", "chunk"])
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_a_released_file_computes_what_the_original_does(tmp_path, tokenizer, factor):
    state, inputs = released_state(tokenizer), random_inputs()
    path = saved(tmp_path / "gpt.pt", {"G_ema": state, "G": released_state(tokenizer, 1), "optim": {"step": 3}})
    model = load_released(path, config(tokenizer, factor=factor)).double()
    scaled = {**inputs, "metric": factor * inputs["metric"], "target": factor * inputs["target"]}
    expected = reference(state, tokenizer, **scaled)
    torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-9)
    assert (expected - inputs["theta"]).std() > 0.1
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_the_average_is_preferred_and_wrappers_are_seen_through(tmp_path):
    state = released_state()
    wrapped = {f"module.{name.replace('blocks.0', 'blocks.0._orig_mod')}": x for name, x in state.items()}
    lightning = {"state_dict": {f"net.{name}": x for name, x in wrapped.items()}, "out": Path("runs/a")}
    found = [
        load_released(saved(tmp_path / f"{i}.pt", content), config()).state_dict()
        for i, content in enumerate([state, {"G": wrapped}, {"G": released_state(seed=1), "G_ema": state}, lightning])
    ]
    for other in found[1:]:
        assert all(torch.equal(found[0][name], x) for name, x in other.items())


def test_an_exported_model_is_read_back_and_is_the_original_one(tmp_path):
    model = Gpt(config("chunk"))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    state = export_released(model)
    assert {name: x.shape for name, x in state.items()} == {
        name: x.shape for name, x in released_state("chunk").items()
    }
    again = load_released(saved(tmp_path / "gpt.pt", {"G_ema": state}), config("chunk"))
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())
    inputs = random_inputs()
    torch.testing.assert_close(again.double()(**inputs), reference(state, "chunk", **inputs), rtol=0, atol=1e-9)


def test_what_the_original_code_does_not_have_is_not_exported():
    with pytest.raises(ValueError, match="tokenizer 'neuron': the released code knows only layer and chunk"):
        export_released(Gpt(GptConfig(SPEC, "neuron", width=24, num_heads=2, scalars="raw")))


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def refusal(path: Path, preset: str | GptConfig) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load_released(path, preset)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    witness = tmp_path / "witness"
    path = saved(tmp_path / "gpt.pt", {"G_ema": released_state(), "optim": Malicious(witness)})
    assert "which may run code" in refusal(path, config())
    assert not witness.exists()


def test_a_model_of_another_width_is_refused_by_its_first_tensor(tmp_path):
    path = saved(tmp_path / "gpt.pt", {"G_ema": released_state()})
    assert "decoder.pos_emb is (1, 18, 24), this preset's (1, 18, 48)" in refusal(path, config(width=48))
    assert "decoder.pos_emb is (1, 18, 24), this preset's (1, 26, 1536)" in refusal(path, "mnist_loss")


@pytest.mark.parametrize(
    "name", ["decoder.blocks.1.attn.key.bias", "decoder.input_parameter_projections.17.0.weight", "decoder.ln_f.bias"]
)
def test_a_missing_tensor_is_named(tmp_path, name):
    state = released_state()
    del state[name]
    assert f"lacks {name}" in refusal(saved(tmp_path / "gpt.pt", {"G": state}), config())


def test_an_unknown_tensor_or_shape_is_named(tmp_path):
    state = released_state()
    deeper = {**state, "decoder.blocks.2.ln1.weight": torch.zeros(24)}
    assert "decoder.blocks.2.ln1.weight (24,) is no part" in refusal(saved(tmp_path / "a.pt", {"G": deeper}), config())
    swapped = {**state, "decoder.blocks.0.mlp.0.weight": torch.zeros(24, 96)}
    assert "decoder.blocks.0.mlp.0.weight is (24, 96), this preset's (96, 24)" in refusal(
        saved(tmp_path / "b.pt", {"G": swapped}), config()
    )
    faster = {**state, "scalar_embedder.frequencies": 2 ** torch.linspace(0, 20, 128)}
    assert "128 up to 1.04858e+06), expected 128 up to 16384" in refusal(
        saved(tmp_path / "c.pt", {"G": faster}), config()
    )


@pytest.mark.parametrize(
    "content", [{"a": torch.zeros(3)}, [torch.zeros(3)], {"G_ema": {"pos_embed": torch.zeros(2)}}, "text"]
)
def test_another_file_is_refused(tmp_path, content):
    expected = "not a checkpoint of wpeebles/G.pt" if isinstance(content, dict) else "expected a state dict"
    assert expected in refusal(saved(tmp_path / "gpt.pt", content), config())


def test_no_checkpoint_at_all_is_refused(tmp_path):
    path = tmp_path / "gpt.pt"
    path.write_bytes(b"<html>404</html>")
    assert "neither a safetensors nor a torch.save file" in refusal(path, config())
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_released(tmp_path / "absent.pt", config())
    with pytest.raises(ValueError, match="preset 'imagenet': expected one of mnist_loss"):
        load_released(path, "imagenet")


TASK = """
from torch import nn
import torch
from triptych_gpt.tasks import Items, SupervisedTask

def points(part):
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(len(part)))
    return Items(inputs, (inputs[:, 0] > 0).long())

def network():
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    policy.log_std = nn.Parameter(torch.zeros(1))
    return policy

OWN = SupervisedTask("own", network, points, epochs=2, batch_size=16)
"""


@pytest.mark.parametrize("tokenizer", ["layer", "chunk"])
def test_a_model_of_ones_own_width_converts(tmp_path, tokenizer):
    """Width, depth and tokens follow from the tensors, heads are given; it computes what the original code does."""
    (tmp_path / "own.py").write_text(TASK)
    state, inputs = released_state(tokenizer), random_inputs()
    path = saved(tmp_path / "gpt.pt", {"G_ema": state})
    task = f"{tmp_path / 'own.py'}:OWN"
    facts = convert(
        ConvertConfig(checkpoint=path, task=task, metric="test_loss", scale=2.5, num_heads=HEADS, out=tmp_path / "out")
    )
    assert (facts["metric"], facts["better"], facts["scale"]) == ("test_loss", "lower", 2.5)
    trained = load(tmp_path / "out", task)
    config = trained.model.config
    assert (config.width, config.depth, config.num_heads, config.tokenizer) == (WIDTH, DEPTH, HEADS, tokenizer)
    expected = reference(state, tokenizer, **inputs)
    torch.testing.assert_close(trained.model.double()(**inputs), expected, rtol=0, atol=1e-9)
    own = convert(ConvertConfig(checkpoint=path, released="cartpole", num_heads=HEADS, out=tmp_path / "released"))
    assert (own["metric"], own["scale"]) == ("train_return", 2.06)


def test_what_does_not_convert_is_one_line(tmp_path):
    path = saved(tmp_path / "gpt.pt", {"G_ema": released_state()})
    for options, message in (
        ({"released": "cartpole"}, "width 24 and 2 blocks do not tell the number of attention heads; give --num-heads"),
        (
            {"num_heads": HEADS},
            r"tokens of 1, 128, 32, .* parameters \(1,250\), the task's networks have 7840, .*give the --task",
        ),
        ({"task": "mnist_mlp"}, "needs --metric and --scale"),
        ({"task": "mnist_mlp", "metric": "loss", "scale": 1.0}, "metric 'loss': task mnist_mlp scores test_loss"),
        ({"released": "cartpole", "num_heads": 5}, "width 24 is not a multiple of num_heads 5"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            convert(ConvertConfig(checkpoint=path, out=tmp_path / "out", **options))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_presets_have_the_facts_that_files_lack():
    assert set(RELEASED) == set(PRESETS) - {"laptop", "cartpole_small"}
    assert {name: facts.scale for name, facts in RELEASED.items()} == {
        "mnist_loss": 4.185, "mnist_error": 4.185, "cifar10_loss": 1.646, "cifar10_error": 1.646, "cartpole": 2.06
    }  # fmt: skip
    for name, facts in RELEASED.items():
        assert (PRESETS[name].metric_factor == 100) == (facts.metric == "test_error")

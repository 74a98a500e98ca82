"""Tokenizers: which are equivariant, that every weight is written once, and what the edges between units do."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from triptych_gpt.config import GptConfig
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.model import Gpt
from triptych_gpt.presets import PRESETS
from triptych_gpt.symmetry.derivation import Residual, derive
from triptych_gpt.symmetry.spec import Axis, Blocks, PermutationSpec
from triptych_gpt.tasks import TASKS
from triptych_gpt.tokenizers import coarsened, joined, make_tokenizer, parts_of, splits

pytestmark = pytest.mark.filterwarnings("ignore:tokens of up to")


def _batch_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def _conv_flatten() -> nn.Sequential:
    convolution = [nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.Flatten()]  # 9 entries a channel
    return nn.Sequential(*convolution, nn.Linear(54, 7), nn.ReLU(), nn.Linear(7, 2))


def _residual() -> nn.Sequential:
    """A stream whose units meet themselves in one layer, and those of a body in two."""
    square = Residual(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    body = Residual(nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)))
    return nn.Sequential(nn.Linear(5, 6), square, body, nn.Linear(6, 3))


def _without_biases() -> nn.Sequential:
    """The middle group has nothing but edges, and there is no global token."""
    widths = (5, 7, 6, 4, 3)
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))


SPECS = {name: task.symmetry for name, task in TASKS.items()} | {
    "cartpole": PRESETS["cartpole"].symmetry,
    "batch norm": derive(_batch_norm()),
    "conv flatten linear": derive(_conv_flatten()),
    "residual": derive(_residual()),
    "without biases": derive(_without_biases()),
    "conv edges": derive(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(4, 2, 3))),
}
N = 3


def random_model(spec: PermutationSpec, tokenizer: str = "neuron", **options) -> Gpt:
    """A tiny model in float64, no weight of which is zero."""
    config = GptConfig(spec, tokenizer, width=16, depth=2, num_heads=2, edge_width=4, scalars="raw", **options)
    model = Gpt(config).double()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan_in = p.shape[-1] if "weight" in name and p.ndim == 2 else 1
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64) * fan_in**-0.5)
    return model


def random_inputs(spec: PermutationSpec, seed: int = 1) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    noised, theta = torch.randn(2, N, spec.layout.size, generator=rng, dtype=torch.float64)
    metric, target = torch.rand(2, N, generator=rng, dtype=torch.float64)
    return {
        "noised": noised, "t": torch.tensor([0, 17, 999]), "theta": theta, "metric": metric, "target": target
    }  # fmt: skip


def permuted_alike(spec: PermutationSpec, inputs: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    permutations = spec.draw(3, range(N))
    moved = {name: spec.apply(inputs[name], permutations) for name in ("noised", "theta")}
    return {**inputs, **moved}, permutations


@pytest.mark.parametrize("name", SPECS)
def test_permuting_units_permutes_the_output_of_neuron_tokens_alike(name):
    spec, model = SPECS[name], random_model(SPECS[name])
    inputs = random_inputs(spec)
    moved, permutations = permuted_alike(spec, inputs)
    with torch.no_grad():
        out, out_moved = model(**inputs), model(**moved)
    assert (out - inputs["theta"]).std() > 0.3
    torch.testing.assert_close(out_moved, spec.apply(out, permutations), rtol=0, atol=1e-10)
    assert (out_moved - out).abs().max() > 0.1


@pytest.mark.parametrize("name", [*TASKS, "cartpole"])
@pytest.mark.parametrize("tokenizer", ["layer", "chunk"])
def test_layer_and_chunk_tokens_are_not_equivariant_and_need_augmentation(name, tokenizer):
    spec = SPECS[name]
    model = random_model(spec, tokenizer, chunk_size=100 if tokenizer == "chunk" else None)
    inputs = random_inputs(spec)
    moved, permutations = permuted_alike(spec, inputs)
    with torch.no_grad():
        gap = model(**moved) - spec.apply(model(**inputs), permutations)
    assert gap.abs().max() > 0.1


@pytest.mark.parametrize("name", SPECS)
def test_units_of_theta_and_of_noised_theta_star_are_read_in_pairs(name):
    """Permuting theta alone is another question."""
    spec, model = SPECS[name], random_model(SPECS[name])
    inputs = random_inputs(spec)
    moved, permutations = permuted_alike(spec, inputs)
    with torch.no_grad():
        update = model(**inputs) - inputs["theta"]
        mismatched = model(**{**inputs, "theta": moved["theta"]}) - moved["theta"]
    assert (mismatched - spec.apply(update, permutations)).abs().max() > 0.1


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_is_written_once(name):
    spec = SPECS[name]
    tokenizer = make_tokenizer(GptConfig(spec, width=16, num_heads=2))
    theta = torch.arange(2 * spec.layout.size, dtype=torch.float64).view(2, -1)
    parts = [part for module in (*tokenizer.units, *tokenizer.edges) for part in module.parts]
    again = torch.cat([parts[i].put(parts[i].take(theta)) for i in tokenizer.order], dim=1)
    assert torch.equal(again, theta)
    model, inputs = random_model(spec), random_inputs(spec)
    with torch.no_grad():
        assert ((model(**inputs) - inputs["theta"]).abs() > 0).all()


def test_a_unit_holds_its_fan_in_bias_and_fan_out():
    spec = SPECS["mnist_mlp_14"]
    theta = torch.randn(N, spec.layout.size, generator=torch.Generator().manual_seed(0))
    parameters = spec.layout.unflatten(theta)
    parts = {name: part.take(theta) for name, part in zip(spec.layout.names, parts_of(spec), strict=True)}
    assert torch.equal(parts["fc1.weight"], parameters["fc1.weight"])
    assert torch.equal(parts["fc1.bias"], parameters["fc1.bias"][:, :, None])
    assert torch.equal(parts["fc2.weight"], parameters["fc2.weight"].mT)
    assert torch.equal(parts["fc2.bias"], parameters["fc2.bias"])


def test_columns_of_a_flattened_map_belong_to_its_channel():
    spec = SPECS["conv flatten linear"]
    theta = torch.randn(N, spec.layout.size, generator=torch.Generator().manual_seed(0))
    part = parts_of(spec)[spec.layout.names.index("3.weight")]
    assert part.groups == ("0", "3")
    weight = spec.layout.unflatten(theta)["3.weight"]  # (N, 7, 6 * 9)
    for i in range(6):
        for j in range(7):
            assert torch.equal(part.take(theta)[:, i, j], weight[:, j, 9 * i : 9 * (i + 1)])


def test_tokens_are_units_and_a_global_one():
    kinds = {name: make_tokenizer(GptConfig(spec, width=16, num_heads=2)).token_kinds for name, spec in SPECS.items()}
    assert kinds["mnist_mlp_14"] == kinds["mnist_mlp"] == [1, 10]
    assert kinds["cifar_cnn"] == [1, 16, 32]
    assert kinds["cartpole"] == [1, 32, 32]
    assert kinds["residual"] == [1, 6, 9]
    assert kinds["without biases"] == [7, 6, 4]


def test_one_hidden_layer_has_no_edges():
    for name in ("mnist_mlp", "mnist_mlp_14", "batch norm"):
        model = random_model(SPECS[name])
        inputs = random_inputs(SPECS[name])
        assert not len(model.tokenizer.edges)
        assert model.tokenizer.encode(inputs["noised"], inputs["theta"]).biases is None
    assert len(random_model(SPECS["cartpole"]).tokenizer.edges) == 1


def test_an_edge_reaches_the_tokens_of_both_ends_and_the_attention_between_them():
    spec = SPECS["cartpole"]
    model, inputs = random_model(spec), random_inputs(spec)
    other = inputs["theta"].clone()
    spec.layout.unflatten(other)["actor.2.weight"][:, 5, 11] += 1  # from unit 11 of fc1 to unit 5 of fc2
    with torch.no_grad():
        before = model.tokenizer.encode(inputs["noised"], inputs["theta"])
        after = model.tokenizer.encode(inputs["noised"], other)
    changed = (before.tokens != after.tokens).any(2).any(0).nonzero().flatten().tolist()
    assert changed == [1 + 11, 1 + 32 + 5]
    biases = (before.biases != after.biases).any(0).any(0).any(0).nonzero().tolist()
    assert biases == [[1 + 11, 1 + 32 + 5], [1 + 32 + 5, 1 + 11]]
    assert before.biases.shape == (2, N, 2, 69, 69)  # depth, networks, heads, 1 + 32 + 32 + 4 tokens


def test_the_update_of_an_edge_is_the_pairwise_formula():
    spec = SPECS["cartpole"]
    tokenizer = random_model(spec).tokenizer
    inputs = random_inputs(spec)
    edges, theirs = tokenizer.edges[0], spec.layout.unflatten(inputs["theta"])["actor.2.weight"]
    noised = spec.layout.unflatten(inputs["noised"])["actor.2.weight"]
    hidden = torch.randn(N, 69, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        update = tokenizer.decode(hidden, tokenizer.encode(inputs["noised"], inputs["theta"]))
        found = spec.layout.unflatten(update)["actor.2.weight"][1, 5, 11]
        e = edges.embed.weight @ torch.stack([theirs[1, 5, 11], noised[1, 5, 11]]) + edges.embed.bias
        ends = edges.from_first(hidden[1, 1 + 11]) + edges.from_second.weight @ hidden[1, 1 + 32 + 5]
        z = ends + edges.from_edge.weight @ e
        expected = edges.decoder.weight @ (0.5 * z * (1 + torch.erf(z / 2**0.5)))
    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mnist_mlp_14", "residual", "cifar_cnn"])
def test_networks_of_a_batch_are_independent(name):
    model, inputs = random_model(SPECS[name]), random_inputs(SPECS[name])
    with torch.no_grad():
        together = model(**inputs)
        alone = torch.cat([model(**{key: x[i : i + 1] for key, x in inputs.items()}) for i in range(N)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mnist_mlp_14", "cartpole", "residual", "without biases"])
@pytest.mark.parametrize("tokenizer", ["neuron", "layer", "chunk"])
def test_gradients_reach_every_parameter_one_step_after_zero(name, tokenizer):
    spec = SPECS[name]
    chunk = {"chunk_size": 100} if tokenizer == "chunk" else {}
    model = Gpt(
        GptConfig(spec, tokenizer, width=16, depth=2, num_heads=2, edge_width=4, scalars="raw", **chunk)
    ).double()
    inputs = random_inputs(spec)
    for _ in range(2):
        model.zero_grad()
        (model(**inputs) - inputs["noised"]).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad  # decoders are zero in the first pass
    missing = [key for key, p in model.named_parameters() if not p.grad.abs().max() > 0]
    assert not missing


def test_splits_of_the_released_models():
    assert splits(PRESETS["mnist_error"]) == [*[1000] * 7, 840, 10, 100, 10]
    assert splits(PRESETS["cifar10_loss"]) == [432, *[576] * 8, 320, 10]
    assert splits(PRESETS["cartpole"]) == [1, 128, 32, 1024, 32, 32, 1]


HEADS = (("heads", 2), ("channels", 3))
LAYERED = ParameterLayout({"cube": (4, 5, 6), "gates": (12, 7), "qkv": (20, 5), "bias": (4,), "scale": ()})
STRIDED = PermutationSpec(LAYERED, {
    "cube": (Axis("a"), Axis("b"), Axis("c")), "gates": (Blocks((((None, 3), ("a", 4)),)), Blocks(((("b", 5),), ((None, 2),)))),
    "qkv": (Blocks((HEADS, HEADS, ((None, 2), ("a", 4)))), Axis("b")), "bias": (Axis("a"),), "scale": (),
})  # fmt: skip


def test_groups_within_others_are_features_of_their_units():
    assert coarsened(STRIDED).groups == {"b": 5, "c": 6, "heads": 2}
    assert all(len(part.groups) <= 2 for part in parts_of(STRIDED))


@pytest.mark.filterwarnings("ignore:tokens of up to")
def test_neuron_tokens_follow_strided_blocks():
    """Every entry is written once, in its place, and permuted units give a permuted update."""
    spec = coarsened(STRIDED)
    torch.manual_seed(0)
    tokens = make_tokenizer(GptConfig(STRIDED, width=32, num_heads=2)).double()
    for p in tokens.parameters():
        nn.init.normal_(p, std=0.3)
    theta, noised = torch.randn(2, 3, spec.layout.size, dtype=torch.float64)

    def update(noised: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        encoded = tokens.encode(noised, theta)
        return tokens.decode(encoded.tokens, encoded)

    order = spec.draw(0, range(3))
    assert update(noised, theta).shape == theta.shape
    moved = update(spec.apply(noised, order), spec.apply(theta, order))
    torch.testing.assert_close(moved, spec.apply(update(noised, theta), order), rtol=0, atol=1e-12)
    parts = parts_of(STRIDED)
    assert torch.equal(joined([part.put(part.take(theta)) for part in parts], [part.piece for part in parts]), theta)


@pytest.mark.parametrize(("tokenizer", "largest"), [("layer", "1,960"), ("chunk", "300"), ("neuron", "207")])
def test_tokens_larger_than_the_width_give_a_warning(tokenizer, largest):
    options = {"chunk_size": 300} if tokenizer == "chunk" else {}
    with pytest.warns(UserWarning, match=f"tokens of up to {largest} parameters do not fit a width of 64"):
        make_tokenizer(GptConfig(SPECS["mnist_mlp_14"], tokenizer, width=64, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_tokenizer(GptConfig(SPECS["mnist_mlp_14"], tokenizer, width=2000, **options))

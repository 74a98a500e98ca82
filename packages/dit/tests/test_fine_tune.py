"""Starting from another model: what is copied, what is not, and what is refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from triptych_common.cli import option
from triptych_dit import DiT, DiTConfig, testing
from triptych_dit.fine_tune import by_layer, check_meaning, start_from
from triptych_dit.model import sincos_position_embedding
from triptych_dit.weights import LatentSpace, TrainedModel, make_diffusion

SMALL = DiTConfig((8, 12), 3, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=5)
random_model = partial(testing.random_model, dtype=torch.float32)
TABLE = "y_embedder.embedding_table.weight"


def test_same_shape_is_an_exact_copy():
    source, model = random_model(SMALL, seed=0), random_model(SMALL, seed=1)
    became = start_from(model, source)
    assert became[TABLE].words == "5 classes copied by number, as names are not known, null row copied"
    assert {fate.words for name, fate in became.items() if name != TABLE} == {"copied"}
    assert all(fate.is_copy for fate in became.values())
    assert became.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


@pytest.mark.parametrize("names", [["a", "b", "c", "d", "e"], ["crane", "a", "crane", "b", "c"], ["a", "b"]])
def test_the_same_names_are_the_same_classes(names):
    """Also where two have one name, or the last classes have none."""
    source, model = random_model(SMALL, seed=0), random_model(SMALL, seed=1)
    fate = start_from(model, source, names=names, source_names=names)[TABLE]
    assert fate == (True, "5 classes copied by name, null row copied")
    assert torch.equal(model.state_dict()[TABLE], source.state_dict()[TABLE])


def test_new_resolution_and_classes_change_exactly_position_and_table():
    source = random_model(SMALL, seed=0)
    model = random_model(replace(SMALL, input_size=(16, 8), num_classes=9), seed=1)
    drawn = model.state_dict()[TABLE].clone()
    became = start_from(model, source)
    state, before = model.state_dict(), source.state_dict()
    assert {name for name, fate in became.items() if not fate.is_copy} == {"pos_embed", TABLE}
    assert torch.equal(state["pos_embed"][0], sincos_position_embedding(8, 4, 16))
    assert torch.equal(state[TABLE][:9], drawn[:9])
    assert torch.equal(state[TABLE][9], before[TABLE][5])  # the null row
    assert torch.equal(state["blocks.1.mlp.fc2.weight"], before["blocks.1.mlp.fc2.weight"])


def test_unguided_output_survives_a_new_class_table():
    source = random_model(SMALL, seed=0).eval()
    model = random_model(replace(SMALL, num_classes=7), seed=1).eval()
    start_from(model, source)
    x, t = torch.randn(2, 3, 8, 12), torch.tensor([3, 500])
    assert torch.equal(model(x, t, torch.tensor([7, 7])), source(x, t, torch.tensor([5, 5])))


def test_a_new_table_is_possible_at_the_same_number_of_classes():
    source, model = random_model(SMALL, seed=0), random_model(SMALL, seed=1)
    drawn = model.state_dict()[TABLE].clone()
    start_from(model, source, new_class_table=True)
    assert torch.equal(model.state_dict()[TABLE][:5], drawn[:5])


def test_classes_stay_when_only_the_null_row_comes_or_goes():
    with_null, without = random_model(SMALL, seed=0), random_model(replace(SMALL, class_dropout_prob=0.0), seed=1)
    assert start_from(without, with_null)[TABLE] == (False, "5 classes copied by number, as names are not known")
    assert torch.equal(without.state_dict()[TABLE], with_null.state_dict()[TABLE][:5])
    model = random_model(SMALL, seed=2)
    said = "5 classes copied by number, as names are not known, null row initialised"
    assert start_from(model, without)[TABLE] == (False, said)
    assert torch.equal(model.state_dict()[TABLE][:5], without.state_dict()[TABLE])


THEIRS = ("tabby, tabby cat", "great dane", "goldfish", "hen", "crane")


@pytest.mark.parametrize(("names", "rows", "said"), [
    (("Great Dane", "hen", "crane", "goldfish", "tabby cat"), (1, 3, 4, 2, 0), "5 classes copied by name, null row copied"),
    (THEIRS, range(5), "5 classes copied by name, null row copied"),
    (("hen", "zebra", "okapi"), (3, None, None), "1 classes copied by name, 2 classes initialised (zebra, okapi), null row copied"),
    (("a", "b", "c", "d", "e"), (None,) * 5, "5 classes initialised, null row copied"),
    (tuple("01234"), range(5), "5 classes copied by number, as names are not known, null row copied"),
])  # fmt: skip
def test_rows_of_the_class_table_go_by_name(names, rows, said):
    """As many classes are not the same classes; another order is the same ones."""
    source, model = random_model(SMALL, seed=0), random_model(replace(SMALL, num_classes=len(names)), seed=1)
    drawn = model.state_dict()[TABLE].clone()
    fate = start_from(model, source, names=names, source_names=THEIRS)[TABLE]
    assert fate == (list(rows) == [0, 1, 2, 3, 4], said)
    table, theirs = model.state_dict()[TABLE], source.state_dict()[TABLE]
    for label, row in enumerate(rows):
        assert torch.equal(table[label], drawn[label] if row is None else theirs[row])


SPACE = LatentSpace("theirs", 0.5, latents_std=(1.0, 2.0, 3.0), latent_channels=3, encoder_sha256="a" * 64)


@pytest.mark.parametrize(("space", "data", "message"), [
    (SPACE, replace(SPACE, spec="moved", sha256="b" * 64), None),
    (SPACE, replace(SPACE, encoder_sha256="c" * 64), "its latents are not the data's: encoder_sha256 is aaaaaaaaaaaa, theirs has"),
    (SPACE, replace(SPACE, spec="ours", encoder_sha256=None, scale_factor=0.2), "scale_factor is 0.5, ours has 0.2"),
    (SPACE, replace(SPACE, spec="ours", latents_std=None), r"latents_std is \(1.0, 2.0, 3.0\), ours has None"),
    (SPACE, None, "a model of latents of theirs, but the data are pixels; --new-latents"),
    (None, SPACE, "a model of pixels, but the data are latents of theirs; --new-latents"),
    (None, None, None),
])  # fmt: skip
def test_a_model_meets_only_data_of_its_kind(space, data, message):
    facts = {"autoencoder": data and data.facts()}
    source = TrainedModel(random_model(SMALL), make_diffusion(SMALL, "noise"), {"autoencoder": space and space.facts()})
    if message is None:
        check_meaning(source, facts, new_latents=False)
    else:
        with pytest.raises(ValueError, match=message):
            check_meaning(source, facts, new_latents=False)
        check_meaning(source, facts, new_latents=True)


def test_an_unknown_autoencoder_is_said(capsys):
    latents = replace(SMALL, in_channels=4)
    source = TrainedModel(random_model(latents), make_diffusion(latents, "noise"), {"predict": "noise"})
    check_meaning(source, {"autoencoder": SPACE.facts()}, new_latents=False)
    assert "the autoencoder of its latents is not known" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": 32}, r"hidden_size 32 \(there 16\)"),
    ({"depth": 3, "num_heads": 4}, r"depth 3 \(there 2\), num_heads 4 \(there 2\)"),
    ({"num_classes": 0}, r"num_classes 0 \(there 5\)"),
    ({"block_design": "adaln"}, r"block_design adaln \(there adaln_zero\)"),
])  # fmt: skip
def test_any_other_difference_is_refused_with_both_sides(change, message):
    with pytest.raises(ValueError, match=message):
        start_from(DiT(replace(SMALL, **change)), DiT(SMALL))


def test_the_report_has_a_line_a_layer():
    model = DiT(replace(SMALL, input_size=(4, 4), num_classes=2))
    lines = by_layer(start_from(model, DiT(SMALL)))
    assert list(lines) == ["pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks.0", "blocks.1", "final_layer"]
    assert lines["blocks.0"] == "copied (10 tensors)"
    assert lines["y_embedder"] == "2 classes initialised, null row copied (1 tensors)"


@pytest.mark.parametrize(("argv", "value"), [
    (["--init-from", "x"], "x"), (["--init-from=x"], "x"), (["--init_from", "x"], "x"), (["--seed", "3"], None),
    (["--init-from"], None),
])  # fmt: skip
def test_an_option_is_read_before_the_others_are_parsed(argv, value):
    assert (option(argv, "init-from")[0] or None) == value

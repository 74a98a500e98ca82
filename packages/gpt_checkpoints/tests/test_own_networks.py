"""Networks of one's own file, from training runs to a prompted network."""

import warnings
from pathlib import Path

import pytest
import torch
from triptych_gpt import Zoo
from triptych_gpt.cli import run
from triptych_gpt.symmetry.spec import check_invariance, forward_of
from triptych_gpt.tasks import Items, SupervisedTask, open_task
from triptych_gpt.tasks.stack import OneByOneWarning, Stack

FILE = """
import torch
from torch import nn
from torch.nn import functional as F
from triptych_gpt.tasks import Items, SupervisedTask

def pictures(part):
    rng = torch.Generator().manual_seed(len(part))
    inputs = torch.randn(32, 2, 6, 6, generator=rng)
    return Items(inputs, (inputs[:, 0].mean((1, 2)) > 0).long())

def sentences(part):
    inputs = torch.randint(9, (32, 5), generator=torch.Generator().manual_seed(len(part)))
    return Items(inputs, (inputs.sum(1) > 20).long())

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        return self.head(x.mean((2, 3)))

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x).mean(1))

class Recurrent(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(9, 3), nn.GRU(3, 5, 2, batch_first=True, dropout=dropout)
        self.head = nn.Linear(5, 2)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0][:, -1])

RESIDUAL = SupervisedTask("residual", Residual, pictures, epochs=2, batch_size=8)
ATTENTION = SupervisedTask("attention", Attention, sentences, epochs=2, batch_size=8)
RECURRENT = SupervisedTask("recurrent", Recurrent, sentences, epochs=2, batch_size=8)
RANDOM = SupervisedTask("random", lambda: Recurrent(0.5), sentences, epochs=2, batch_size=8)
"""
TOKENS = {"neuron": [], "chunk": ["--tokenizer", "chunk", "--chunk-size", "16"], "layer": ["--tokenizer", "layer"]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(FILE)
    return tmp_path / "own.py"


@pytest.mark.filterwarnings("ignore:tokens of up to")
@pytest.mark.parametrize(
    ("name", "tokens"), [("RESIDUAL", "neuron"), ("ATTENTION", "neuron"), ("ATTENTION", "chunk"), ("RESIDUAL", "layer")]
)
def test_from_training_runs_to_a_prompted_network(name, tokens, file, tmp_path, capsys):
    task, (zoo, gpt, out) = f"{file}:{name}", (str(tmp_path / part) for part in ("zoo", "gpt", "prompted"))
    collect = ["--runs", "6", "--cohort-runs", "2", "--checkpoints", "4", "--split-every", "3", "--engine", "here"]
    assert run(["collect", task, *collect, "--networks-at-once", "2", "--device", "cpu", "--out", zoo]) == 0
    assert Zoo(zoo).splits == {"train": 2, "validation": 2, "test": 2}
    shape = ["--width", "32", "--depth", "1", "--num-heads", "2", "--device", "cpu", "--validation-networks", "1"]
    pairs = ["--total-pairs", "32", "--batch-size", "16", "--warmup-pairs", "16", "--validation-inference-steps", "2"]
    assert run(["train", "--zoo", zoo, "--task", task, *shape, *pairs, *TOKENS[tokens], "--out", gpt]) == 0
    target = ["--target", "test_loss=0.6", "--num-inference-steps", "2", "--pickle", "--device", "cpu"]
    assert run(["prompt", "--model", gpt, "--task", task, *target, "--out", out]) == 0
    opened = open_task(task)
    assert isinstance(opened, SupervisedTask)
    network = opened.network()
    network.load_state_dict(torch.load(Path(out) / "net-000.pt"), strict=False)
    expected = opened.evaluate(opened.layout.flatten(network.state_dict())[None])["test_loss"]
    assert f"{float(expected[0]):.4g}"[:5] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["RESIDUAL", "ATTENTION", "RECURRENT"])
def test_their_symmetry_is_found(name, file):
    task = open_task(f"{file}:{name}")
    assert isinstance(task, SupervisedTask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = task.symmetry
    groups = {
        "RESIDUAL": {"stem": 4, "first": 6},
        "ATTENTION": {"embed": 6, "attention": 2, "attention:2": 3, "attention:3": 3},
        "RECURRENT": {"embed": 3, "rnn": 5, "rnn:2": 5},
    }
    assert spec.groups == groups[name]
    inputs = task.items["test"].inputs[:4]
    assert check_invariance(forward_of(task.stack.network), spec, task.initial(0, range(3)), inputs) < 1e-12


def test_networks_that_cannot_be_batched_are_reported_once(file, tmp_path, capsys):
    options = ["--runs", "4", "--cohort-runs", "2", "--checkpoints", "3", "--engine", "here", "--networks-at-once", "2"]
    assert run(["collect", f"{file}:RECURRENT", *options, "--device", "cpu", "--out", str(tmp_path / "zoo")]) == 0
    assert capsys.readouterr().err.count("Recurrent cannot be batched") == 1
    assert run(["collect", f"{file}:RANDOM", *options, "--device", "cpu", "--out", str(tmp_path / "random")]) == 1
    assert "draws random numbers" in capsys.readouterr().err


def test_tokens_are_numbers(file):
    task = open_task(f"{file}:RECURRENT")
    assert isinstance(task, SupervisedTask)
    with pytest.warns(OneByOneWarning, match=r"Recurrent cannot be batched .*one by one, slower"):
        Stack(task.network()).probe(task.items["train"].inputs[:2])
    with pytest.raises(ValueError, match=r"inputs of torch\.int32: expected floating-point, .* or numbers of tokens"):
        Items(torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3))

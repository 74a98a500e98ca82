"""Running a model on one process: recomputation, compilation, precision, devices. Several ranks: test_ranks.py."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from triptych_common import parallel, throughput
from triptych_common.parallel import Execution, Ranks, prepare, process_group
from triptych_common.training import TrainState
from triptych_common.transformer import Block

ALONE = Ranks(0, 1, torch.device("cpu"))


class Stack(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, 2) for _ in range(3))
        self.head = nn.Linear(8, 4)
        rng = torch.Generator().manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=rng)
        self.to(dtype)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_recomputing_activations_changes_neither_gradients_nor_names():
    model, x = Stack(), torch.randn(2, 5, 8, dtype=torch.float64)
    expected, names, runs = gradients(model, x), list(model.state_dict()), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *_: runs.append(1))
    prepare(model, ALONE, Execution(precision="float64", activation_checkpointing=True))
    found = gradients(model, x)
    assert len(runs) == 2 * 3  # once forward, once again backward
    assert list(model.state_dict()) == names
    assert isinstance(model.blocks[0], Block)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


def test_a_copy_of_a_prepared_model_runs_on_its_own_weights():
    model, x = Stack(torch.float32), torch.randn(2, 5, 8)
    prepare(model, ALONE, Execution(precision="bf16", activation_checkpointing=True))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert model(x).abs().max() > 0.1
    assert twin(x).abs().max() == 0


def test_bfloat16_rounds_arithmetic_and_returns_float32():
    model, x = Stack(torch.float32), torch.randn(2, 5, 8)
    exact = model(x)
    prepare(model, ALONE, Execution(precision="bf16"))
    rounded = model(x)
    assert rounded.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert 1e-4 < float(((rounded - exact).norm() / exact.norm()).detach()) < 3e-2


COMPILED = """
import functools, json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # compiling C++ would only take time
from test_parallel import ALONE, Execution, Stack, gradients, prepare

model, x = Stack(), torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
expected, names = gradients(model, x), list(model.state_dict())
prepare(model, ALONE, Execution(precision="float64", compile=True, activation_checkpointing=True))
found = gradients(model, x)
error = max(float((found[name] - value).abs().max()) for name, value in expected.items())
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
print(json.dumps({"error": error, "graphs": graphs, "same names": list(model.state_dict()) == names}))
"""


def test_compiled_blocks_keep_gradients_and_share_one_graph():
    """Runs in another process, since the type checks of this one do not compile."""
    command = [sys.executable, "-c", COMPILED, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reported = json.loads(done.stdout.splitlines()[-1])
    assert reported["error"] < 1e-12
    assert (reported["graphs"], reported["same names"]) == (1, True)  # not one graph per block


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": "zero"}, "parallel 'zero': expected one of ddp, fsdp"),
        ({"precision": "fp16"}, "precision 'fp16': expected one of float32, bf16, float64"),
    ],
)
def test_an_unknown_choice_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Execution(**options)


def test_a_model_without_blocks_is_refused_only_where_they_are_needed():
    prepare(nn.Linear(2, 2), ALONE, Execution(precision="bf16"))
    with pytest.raises(ValueError, match="Linear has no submodule 'blocks'"):
        prepare(nn.Linear(2, 2), ALONE, Execution(activation_checkpointing=True))
    prepare(nn.Sequential(nn.Linear(2, 2)), ALONE, Execution(activation_checkpointing=True, blocks=("0",)))


def test_an_optimizer_of_parameters_that_sharding_replaces_is_refused():
    model = Stack()
    with pytest.raises(ValueError, match="pass the function that makes the optimizer"):
        TrainState(
            model, torch.optim.SGD(model.parameters()), Ranks(0, 2, torch.device("cpu")), ema_half_life=1,
            execution=Execution("fsdp"),
        )  # fmt: skip


def test_gradients_are_averaged_in_one_exchange_whatever_their_layout():
    """A stand-in for two ranks, of which the other has twice this one's gradients."""
    exchanges = []

    class Pair(Ranks):
        def sum(self, tensor):
            exchanges.append(tensor.numel())
            return 3 * tensor

    shapes = [(4, 3, 3, 3), (5,), ()]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    expected = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for p, gradient in zip(parameters, expected, strict=True):
        p.grad = gradient.clone()
    parameters[0].grad = parameters[0].grad.to(memory_format=torch.channels_last)
    parallel.average_gradients(parameters, Pair(0, 2, torch.device("cpu")))
    assert exchanges == [108 + 5 + 1]
    for p, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, 1.5 * gradient, rtol=0, atol=1e-15)
    parallel.average_gradients(parameters, ALONE)
    torch.testing.assert_close(parameters[1].grad, 1.5 * expected[1], rtol=0, atol=1e-15)
    parallel.average_gradients([], Pair(0, 2, torch.device("cpu")))
    assert len(exchanges) == 1


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that appears to have two GPUs."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_rank_takes_the_gpu_of_its_place_on_its_machine(two_gpus):
    assert parallel._device("auto", local_rank=1, local_ranks=2) == torch.device("cuda:1")
    assert parallel._device("cuda:1", local_rank=0, local_ranks=1) == torch.device("cuda:1")
    assert two_gpus == [torch.device("cuda:1")] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("auto", "4 ranks on a machine with 2 GPUs; start torchrun with --nproc-per-node=2"),
        ("cuda:0", "device 'cuda:0': one GPU for 4 ranks; use --device cuda"),
    ],
)
def test_more_ranks_than_gpus_are_refused(two_gpus, monkeypatch, name, message):
    for key, value in {"WORLD_SIZE": 8, "RANK": 7, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(ValueError, match=message), process_group(name):
        pass


@pytest.mark.parametrize(("name", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_ranks_wait_for_one_that_prepares_something(two_gpus, monkeypatch, name, backend):
    """Ranks wait for hours, whereas NCCL's default is to give up after ten minutes."""
    for key, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(key, str(value))
    joined = []
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *args, **options: joined.append((args, options)))
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(parallel.dist, "destroy_process_group", lambda: None)
    with process_group(name):
        pass
    (((chosen,), options),) = joined
    assert chosen == backend
    assert options["timeout"].total_seconds() >= 2 * 3600


def test_peak_rates_are_known_by_name_and_unknown_otherwise(monkeypatch):
    assert throughput.peak_flops(torch.device("cpu"), "bf16") is None
    gpu, peaks = torch.device("cuda", 0), {}
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA A10G",
                 "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce GT 1030"):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peaks[name] = [throughput.peak_flops(gpu, precision) for precision in ("bf16", "float32", "float64")]
    assert list(peaks.values()) == [
        [312e12, 19.5e12, None], [989e12, 67e12, None], [756e12, 51e12, None], [989e12, 67e12, None],
        [None] * 3, [None] * 3, [None] * 3,
    ]  # fmt: skip
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    assert throughput.peak_flops(gpu, "float32") == 156e12


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's own count")
def test_peak_memory_is_what_the_kernel_counts():
    held = torch.ones(2**22)
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    assert throughput.peak_bytes(torch.device("cpu")) == pytest.approx(1024 * kib, rel=0.01)
    assert held.nbytes < 1024 * kib


FAULTS = """
import resource, sys
import torch
from triptych_common.throughput import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for i in range(20):
    if i == 10:  # by now the heap has reached its final size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, more than glibc keeps by default
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's C library")
def test_memory_that_was_freed_is_not_faulted_in_again():
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["keep"] < faults["leave"] / 4


def test_a_c_library_without_that_setting_is_left_alone(monkeypatch):
    monkeypatch.setattr(throughput.ctypes, "CDLL", lambda name: object())
    throughput.keep_freed_memory()

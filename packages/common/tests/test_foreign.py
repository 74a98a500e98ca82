"""Files of other programs: read without running code they contain, and written atomically."""

import argparse
import io
import pathlib
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from triptych_common.storage import foreign, pickle_machine
from triptych_common.storage.bounded import Bounded
from triptych_common.storage.files import new_folder
from triptych_common.storage.pickle_machine import TooLarge
from triptych_common.testing import peak_bytes


class Malicious:
    def __reduce__(self):
        return pytest.fail, ("unpickling ran code",)


def test_tensors_are_read_from_either_format_old_and_new(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2).half()}
    torch.save(tensors, tmp_path / "new.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "tensors.safetensors", {"state": "{}"})
    for name in ("new.pt", "old.pt", "tensors.safetensors"):
        found = foreign.read(tmp_path / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    assert foreign.metadata(tmp_path / "tensors.safetensors") == {"state": "{}"}
    assert foreign.metadata(tmp_path / "new.pt") == foreign.metadata(tmp_path) == {}


def test_what_training_scripts_save_beside_weights_is_read_and_nothing_else(tmp_path):
    beside = {
        "args": argparse.Namespace(size=3, out=pathlib.Path("runs/a")), "metric": np.float64(0.5), "epoch": np.int32(7),
        "best": np.bool_(True), "curve": np.arange(6.0).reshape(2, 3).T, "random": random.getstate(),
        "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": [torch.get_rng_state()],
        "elsewhere": pathlib.PureWindowsPath("C:/runs/a"),
    }  # fmt: skip
    torch.save({"model": {"a": torch.ones(2)}, **beside}, tmp_path / "run.pt")
    found = foreign.read(tmp_path / "run.pt")
    assert found["args"].size == 3
    assert found["args"].out == pathlib.PurePosixPath("runs/a")
    assert found["elsewhere"] == beside["elsewhere"]
    assert (found["metric"], found["epoch"], found["best"], found["random"]) == (0.5, 7, True, random.getstate())
    np.testing.assert_array_equal(found["curve"], beside["curve"])
    np.testing.assert_array_equal(found["numpy"][1], beside["numpy"][1])
    assert torch.equal(found["torch"], beside["torch"])
    for harmful in (print, pathlib.Path.unlink, np.load, np.array(["a"], dtype=object).dumps, random.Random):
        torch.save({"model": {"a": torch.ones(2)}, "hook": harmful}, tmp_path / "harmful.pt")
        with pytest.raises(ValueError, match="which may run code when read"):
            foreign.read(tmp_path / "harmful.pt")


NET, AVERAGE = {"a.weight": torch.ones(2), "blocks.0.attn.b": torch.zeros(3)}, {"a.weight": torch.full((2,), 2.0)}
AVERAGE |= {"blocks.0.attn.b": torch.ones(3)}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


LAYOUTS = {
    "bare": (NET, "", ""),
    "DistributedDataParallel": (under("module.", NET), "", ""),
    "compiled, then distributed": ({"model": under("module._orig_mod.", NET)}, "model", "model"),
    "compiled blocks": ({"a.weight": NET["a.weight"], "blocks.0._orig_mod.attn.b": NET["blocks.0.attn.b"]}, "", ""),
    "FSDP and checkpointing": (
        {"a._fsdp_wrapped_module.weight": NET["a.weight"],
         "_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.attn._orig_mod.b": NET["blocks.0.attn.b"]}, "", "",
    ),
    "Lightning": ({"state_dict": under("net.", NET), "hyper_parameters": {"lr": 1e-3}}, "state_dict.net", "state_dict.net"),
    "Lightning with an average": (
        {"state_dict": under("model.", NET) | under("ema_model.module.", AVERAGE) | {"ema_model.n_averaged": torch.tensor(3)}},
        "state_dict.ema_model", "state_dict.model",
    ),
    "two entries": ({"ema": AVERAGE, "model": NET, "opt": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "ema", "model"),
    "timm": ({"state_dict": NET, "state_dict_ema": AVERAGE}, "state_dict_ema", "state_dict"),
    "nested": ({"state": {"model_state_dict": NET, "rng": {"torch": torch.get_rng_state()}}},) + ("state.model_state_dict",) * 2,
    "ema_pytorch": (
        {"ema": under("ema_model.", AVERAGE) | under("online_model.", NET) | {"ema.step": torch.tensor(1)}, "model": NET},
        "ema.ema_model", "model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_network_is_found_wherever_a_script_put_it(tmp_path, name):
    content, average, trained = LAYOUTS[name]
    torch.save(content, tmp_path / "file.pt")
    for prefer, place in (("ema", average), ("model", trained)):
        found = foreign.state_dict(tmp_path / "file.pt", holds=list(NET), prefer=prefer)
        expected = AVERAGE if "ema" in place else NET
        assert found.place == place
        assert found.tensors.keys() == expected.keys()
        assert all(torch.equal(found.tensors[key], expected[key]) for key in expected)


def test_networks_that_nothing_tells_apart_are_named():
    with pytest.raises(ValueError, match=r"holds several networks \(teacher, student\); save the one"):
        foreign.network_in({"teacher": NET, "student": dict(NET)}, holds=list(NET))
    with pytest.raises(ValueError, match="holds a list, expected a state dict"):
        foreign.network_in([NET], holds=list(NET))


@pytest.mark.parametrize(("content", "left"), [
    ({"model": NET, "ema": {"decay": 0.99, "shadow_params": list(AVERAGE.values())}}, "ema"),  # diffusers' EMAModel, torch_ema
    ({"state_dict": under("model.", NET) | {"model_ema.blocks0attnb": torch.ones(3)}}, "model_ema.blocks0attnb"),  # LitEma
    ({"model": NET, "ema_decay": 0.99, "ema": AVERAGE}, None),
    ({"model": NET, "ema": {"decay": torch.tensor(0.99)}}, None),
])  # fmt: skip
def test_an_average_that_cannot_be_used_is_not_passed_over_in_silence(content, left, capsys):
    foreign.network_in(content, holds=list(NET))
    said = f"the average {left!r} has no names of tensors and is left aside: these are weights in training\n"
    assert capsys.readouterr().out == (said if left else "")
    foreign.network_in(content, holds=list(NET), prefer="model")
    assert capsys.readouterr().out == ""


def test_a_module_may_be_named_as_a_wrapper_is_and_a_mapping_hold_itself():
    own = under("module.", NET)
    assert foreign.network_in(own, holds=list(own)).tensors.keys() == own.keys()
    content = {"model": NET}
    content["again"] = content
    assert foreign.network_in(content, holds=list(NET)).place == "model"
    assert foreign.network_in({"state_dict": under("module.", NET)}, holds=["c"]).tensors.keys() == NET.keys()


def test_nothing_is_run_and_nothing_damaged_is_taken(tmp_path):
    torch.save(Malicious(), tmp_path / "zip.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Malicious()))
    torch.save({"a": torch.zeros(9999)}, tmp_path / "whole.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.safetensors").write_text("not found")
    for name in ("zip.pt", "plain.pkl", "short.pt", "empty.pt", "text.safetensors"):
        message = "_pytest.outcomes.*may run code" if name == "zip.pt" else "truncated, or neither"
        with pytest.raises(ValueError, match=message) as refused:
            foreign.read(tmp_path / name)
        assert "\n" not in str(refused.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        foreign.read(tmp_path / "absent.pt")


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def zipped(content: bytes, records: dict[str, bytes] | None = None, *, packed: bool = False) -> bytes:
    """As torch.save writes it, of a pickle made by hand."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, record in {"data.pkl": content, "version": b"3\n", "byteorder": b"little", **(records or {})}.items():
            archive.writestr(f"archive/{name}", record)
    return file.getvalue()


STORAGE = object()


def tensor_pickle(storage_numel: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A state dict of one tensor, whose storage says that it has so many numbers."""

    class Storages(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", torch.FloatStorage, "0", "cpu", storage_numel) if thing is STORAGE else None

    file = io.BytesIO()
    rebuilt = Call(torch._utils._rebuild_tensor_v2, STORAGE, 0, size, stride, False, {})
    Storages(file, 2).dump({"a": rebuilt})
    return file.getvalue()


def many_views(count: int) -> bytes:
    file = io.BytesIO()
    big = torch.zeros(1 << 20)
    torch.save({str(i): big[0:] for i in range(count)}, file)
    return file.getvalue()


COPY = b"c__builtin__\nset\nh\x00\x85R"  # the set of a list that is written once
FLOATS = {"data/0": bytes(64)}
BOMBS = {
    "a bytearray of a size": zipped(pickle.dumps(Call(bytearray, 1 << 33), 2)),
    "a tensor of a size": zipped(pickle.dumps(Call(torch.Tensor, 1 << 31), 2)),
    "a storage beyond its record": zipped(tensor_pickle(1 << 31, (1 << 31,), (1,)), FLOATS),
    "a number repeated by its stride": zipped(tensor_pickle(16, (1 << 20, 1 << 11), (0, 0)), FLOATS),
    "packed zeros": zipped(tensor_pickle(1 << 28, (1 << 28,), (1,)), {"data/0": bytes(1 << 28)}, packed=True),
    "one storage under a thousand names": many_views(1000),
    "copies of copies": zipped(b"\x80\x02]q\x00(" + b"K\x01" * 50_000 + b"e0(" + COPY * 9000 + b"l."),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_of_few_bytes_takes_few(name, tmp_path):
    path = tmp_path / "bomb.pt"
    path.write_bytes(BOMBS[name])

    def refused():
        with pytest.raises(ValueError, match=r"bomb\.pt: ") as found:
            foreign.read(path)
        assert "\n" not in str(found.value)

    assert peak_bytes(refused) < 4 * len(BOMBS[name]) + (600 << 20)


def test_the_number_of_opcodes_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_machine, "_MOST_OPCODES", 1000)
    (tmp_path / "bomb.pt").write_bytes(zipped(b"\x80\x02(" + b"]" * 1000 + b"l."))
    with pytest.raises(ValueError, match="more than 1,000 opcodes"):
        foreign.read(tmp_path / "bomb.pt")


def test_a_storage_of_old_files_may_not_claim_more_than_the_file(tmp_path):
    """The numbers of storages stand in the pickle, before any of their bytes."""
    file = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, file, _use_new_zipfile_serialization=False)
    number, larger = b"M" + struct.pack("<H", 1000), b"J" + struct.pack("<i", 1 << 30)
    assert number in file.getvalue()
    (tmp_path / "old.pt").write_bytes(file.getvalue().replace(number, larger))
    with pytest.raises(ValueError, match=r"old\.pt: would take more than"):
        foreign.read(tmp_path / "old.pt")


def test_what_torch_saves_is_within_the_bounds(tmp_path):
    """Views, shared storages, optimisers' states, all kinds of numbers; written by old and new versions."""
    weight = torch.nn.Linear(40, 40)
    optimizer = torch.optim.Adam(weight.parameters())
    weight(torch.ones(40)).sum().backward()
    optimizer.step()
    kinds = {str(d): torch.ones(3, dtype=d) for d in (torch.bfloat16, torch.bool, torch.complex64, torch.int8)}
    base = torch.arange(24.0)
    views = {"t": base.view(4, 6).T, "tail": base[5:], "expanded": torch.ones(1).expand(1), "empty": torch.empty(0, 3)}
    content = {
        "m": weight.state_dict(),
        "o": optimizer.state_dict(),
        **kinds,
        **views,
        "n": 10**30,
        "b": b"x",
        "s": {1},
    }
    for zipped_ in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped_)
        found = foreign.read(tmp_path / "a.pt")
        assert all(torch.equal(found[name], tensor) for name, tensor in (kinds | views).items())
        assert found["o"]["state"][0]["step"] == 1


def test_networks_of_a_config_end_before_they_are_large():
    def build():
        for config in ((10**6, 10**6), (10**9, 1)):
            with pytest.raises(TooLarge, match="would take more than"), Bounded(1000):
                torch.nn.Linear(*config)
        with pytest.raises(TooLarge), Bounded(1000):
            torch.ones(10**4)[:, None] * torch.ones(10**5)
        with pytest.raises(TooLarge), Bounded(1000):
            torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(10**6))

    assert peak_bytes(build) < 200 << 20
    with Bounded(1000):
        kept = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.LayerNorm(1000))
    assert kept(torch.ones(1000)).shape == (1000,)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    foreign.write(path, {"a": torch.ones(2)})

    def full_disk(content, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"cannot be written .*unexpected pos 64 vs 0"):
        foreign.write(path, {"a": torch.zeros(2)})
    assert torch.equal(foreign.read(path)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"

    def write(text):
        with new_folder(out, replaces="mark") as folder:
            (folder / "mark").write_text(text)
            if text == "interrupted":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("interrupted")
    assert not out.exists()
    write("first")
    with pytest.raises(KeyboardInterrupt):
        write("interrupted")
    assert (out / "mark").read_text() == "first"
    killed, of_another = (out.parent / f".out-{middle}.partial" for middle in ("abcdefgh", "x-abcdefgh"))
    for left in (killed, of_another):
        left.mkdir()
    write("second")
    assert (out / "mark").read_text() == "second"
    assert not killed.exists()
    of_another.rmdir()  # of a process that may be running
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (out / "mark").rename(out / "other")
    with pytest.raises(ValueError, match=r"holds something else \(no mark\)"):
        write("third")

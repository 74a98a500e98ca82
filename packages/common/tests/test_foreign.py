"""Files of other programs: read without running code they contain, and written atomically."""

import argparse
import pathlib
import pickle
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from triptych_common.storage import foreign
from triptych_common.storage.files import new_folder


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

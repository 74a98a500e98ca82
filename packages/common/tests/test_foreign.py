"""Files of other programs: read without running code they contain, and written atomically."""

import argparse
import pickle

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


def test_only_allowed_classes_are_built(tmp_path):
    torch.save({"args": argparse.Namespace(size=3)}, tmp_path / "args.pt")
    assert foreign.read(tmp_path / "args.pt", allow=[argparse.Namespace])["args"].size == 3
    with pytest.raises(ValueError, match=r"\(argparse.Namespace\), which may run code"):
        foreign.read(tmp_path / "args.pt")


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

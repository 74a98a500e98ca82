import json
import subprocess
import sys

import pytest
import torch
from triptych_common.storage import checkpoint

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a.step": torch.tensor(7.0),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "n": torch.tensor([1, 2]),
    "empty": torch.zeros(0, 4),
}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "step-00000001.safetensors"
    checkpoint.write(path, TENSORS, {"step": 1, "loss": 0.1})
    tensors, state = checkpoint.read(path)
    assert state == {"step": 1, "loss": 0.1}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_content_hash_is_the_same_however_often_it_is_written(tmp_path):
    hashes = set()
    for i in range(8):
        checkpoint.write(tmp_path / f"{i}.safetensors", TENSORS, {"step": 1})
        hashes.add(checkpoint.content_sha256(tmp_path / f"{i}.safetensors"))
    checkpoint.write(tmp_path / "other.safetensors", TENSORS, {"step": 2})
    assert len(hashes) == 1
    assert checkpoint.content_sha256(tmp_path / "other.safetensors") not in hashes


def test_a_digest_is_of_names_types_shapes_and_values_however_they_lie():
    values = torch.arange(24.0).view(1, 2, 3, 4)
    known = checkpoint.digest({"w": values})
    strided = values.to(memory_format=torch.channels_last).requires_grad_()
    assert not strided.is_contiguous()
    assert checkpoint.digest({"w": strided}) == known
    others = [{"v": values}, {"w": values.double()}, {"w": values.view(2, 12)}, {"w": values + 1}]
    assert known not in [checkpoint.digest(other) for other in others]


@pytest.mark.parametrize("damage", ["truncate", "tensor", "state", "empty"])
def test_damage_is_found_and_the_remedy_named(tmp_path, damage):
    for step in (1, 2):
        checkpoint.write(checkpoint.step_path(tmp_path, step), TENSORS, {"step": step})
    path = checkpoint.step_path(tmp_path, 2)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[:-3]
    elif damage == "tensor":
        content[-1] ^= 1
    elif damage == "state":
        content = content.replace(b'step\\": 2', b'step\\": 3')
    else:
        content = b""
    assert bytes(content) != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"delete it to go on from step-00000001.safetensors"):
        checkpoint.read(path)


def test_foreign_safetensors_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not one of triptych's"):
        checkpoint.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("steps", "kept"), [
    (["1", "5", "20", "30"], ["20", "30"]),
    (["5", "7-extra", "20", "25-extra", "30"], ["20", "30"]),
    (["5", "20", "25-extra", "30-extra"], ["5", "20", "30-extra"]),
    (["5", "20-extra", "20"], ["5", "20"]),
])  # fmt: skip
def test_prune_keeps_the_last_scheduled_and_the_newest_and_clears_leftovers(tmp_path, steps, kept):
    for name in steps:
        step, _, extra = name.partition("-")
        checkpoint.write(checkpoint.step_path(tmp_path, int(step), extra=bool(extra)), {"x": torch.zeros(1)}, {})
    (tmp_path / "step-00000400.safetensors.partial").write_bytes(b"half")
    checkpoint.prune(tmp_path, keep=2)
    assert [p.stem.removeprefix("step-").lstrip("0") for p in sorted(tmp_path.iterdir())] == kept


FULL_DISK = """
import json, resource, sys, torch
from pathlib import Path
from triptych_common.storage import checkpoint
path = Path(sys.argv[1])
checkpoint.write(path, {"x": torch.zeros(10)}, {"good": True})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoint.write(path, {"x": torch.zeros(100_000)}, {"good": False})
except OSError as error:
    print(json.dumps({"error": str(error), "kept": checkpoint.read(path)[1]}))
"""


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "step-00000001.safetensors"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    reported = json.loads(done.stdout)
    assert reported["kept"] == {"good": True}
    assert "cannot be written" in reported["error"]
    assert "\n" not in reported["error"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_equal_contents_are_equal_bytes(tmp_path):
    # safetensors orders metadata by a hash that is seeded at random for each file
    for name in "abcdefgh":
        checkpoint.write(tmp_path / name, {"z": torch.ones(2), "ä": torch.zeros(3)}, {"é\n": "\x01\x7f"})
    assert len({(tmp_path / name).read_bytes() for name in "abcdefgh"}) == 1
    tensors, state = checkpoint.read(tmp_path / "a")
    assert state == {"é\n": "\x01\x7f"}
    assert torch.equal(tensors["z"], torch.ones(2))

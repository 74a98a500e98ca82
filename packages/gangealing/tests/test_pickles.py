"""Pickles in NVIDIA's layout are read as plain data; anything more is refused by name, and never runs."""

import contextlib
import io
import os
import pickle
import pickletools
import struct
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from triptych_gangealing.stylegan2.pickles import load_pickle


@contextlib.contextmanager
def nvidia_modules():
    """Stand-ins for NVIDIA's modules, so that pickle can name what is in them; gone afterwards."""

    def placed(name, module, **attributes):
        made = sys.modules.setdefault(module, types.ModuleType(module))
        for key, value in attributes.items():
            value.__module__, value.__qualname__, value.__name__ = module, key, key
            setattr(made, key, value)
        added.append(module)

    added: list[str] = []
    for package in ("torch_utils", "dnnlib", "dnnlib.tflib"):
        placed("", package)
    placed("", "torch_utils.persistence", _reconstruct_persistent_obj=lambda meta: meta)
    placed("", "dnnlib.util", EasyDict=type("EasyDict", (dict,), {}))
    placed("", "dnnlib.tflib.network", Network=type("Network", (), {}))
    try:
        yield types.SimpleNamespace(
            rebuild=sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj,
            EasyDict=sys.modules["dnnlib.util"].EasyDict,
            Network=sys.modules["dnnlib.tflib.network"].Network,
        )
    finally:
        for name in added:
            sys.modules.pop(name, None)


class Reduced:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return *self.call, None


def persistent(nvidia, state, *, class_name="Generator", source="import torch", kind="class"):
    meta = {"type": kind, "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return Reduced(nvidia.rebuild, meta)


def module_state(parameters=(), buffers=(), modules=(), **attributes):
    return {
        "training": False,
        "_parameters": OrderedDict({k: torch.nn.Parameter(v) for k, v in dict(parameters).items()}),
        "_buffers": OrderedDict(buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_modules": OrderedDict(modules),
        **attributes,
    }


def network(nvidia, **options):
    """A generator of two layers, as NVIDIA's code would pickle it."""
    parameters, buffers = {"weight": torch.arange(6.0).view(2, 3).T}, {"noise_const": torch.ones(4, 4).half()}
    state = module_state(parameters, buffers, weight_gain=np.float64(0.25))
    inner = persistent(nvidia, state, class_name="SynthesisLayer")
    kwargs = nvidia.EasyDict(z_dim=512, synthesis_kwargs=nvidia.EasyDict(channel_base=16384))
    state = module_state(buffers={"w_avg": torch.arange(3)}, modules={"b4": inner}, _init_kwargs=kwargs, z_dim=512)
    return persistent(nvidia, state, **options)


def write(path: Path, make, protocol: int = 3) -> Path:
    with nvidia_modules() as nvidia:
        path.write_bytes(pickle.dumps(make(nvidia), protocol))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load_pickle(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_network_comes_out_as_plain_data(tmp_path, protocol):
    def make(nvidia):
        return nvidia.EasyDict(
            training_set_kwargs=nvidia.EasyDict(path="x"), G=network(nvidia), D=None, augment_pipe=None
        )

    found = load_pickle(write(tmp_path / "a.pkl", make, protocol))
    assert found.keys() == {"G"}
    assert found["G"].class_name == "Generator"
    assert found["G"].kwargs == {"z_dim": 512, "synthesis_kwargs": {"channel_base": 16384}}
    assert found["G"].tensors.keys() == {"w_avg", "b4.weight", "b4.noise_const"}
    assert torch.equal(found["G"].tensors["b4.weight"], torch.arange(6.0).view(2, 3).T)
    assert found["G"].tensors["b4.noise_const"].dtype == torch.float16
    assert found["G"].tensors["w_avg"].tolist() == [0, 1, 2]
    assert found["G"].settings["b4.weight_gain"] == 0.25
    assert type(found["G"].settings["b4.weight_gain"]) is float
    assert not any(name.startswith(("torch_utils", "dnnlib")) for name in sys.modules)


def test_tensors_that_share_a_storage_are_read(tmp_path):
    def make(nvidia):
        flat = torch.arange(12.0)
        state = module_state(buffers={"a": flat[2:5], "b": flat.view(3, 4)[:, ::2], "number": flat[7]})
        return {"G_ema": persistent(nvidia, state)}

    tensors = load_pickle(write(tmp_path / "a.pkl", make))["G_ema"].tensors
    assert tensors["a"].tolist() == [2, 3, 4]
    assert tensors["b"].tolist() == [[0, 2], [4, 6], [8, 10]]
    assert tensors["number"].shape == ()
    assert tensors["number"] == 7


@pytest.mark.parametrize("order", ["<", ">"])
def test_networks_of_the_tensorflow_era_are_read(tmp_path, order):
    values = np.arange(6).astype(f"{order}f4").reshape(2, 3)

    def tensorflow(nvidia, variables, **components):
        made = nvidia.Network()
        made.__dict__ = {
            "version": 4, "static_kwargs": nvidia.EasyDict(resolution=8), "build_func_name": "G_main",
            "variables": variables, "components": nvidia.EasyDict(components),
        }  # fmt: skip
        return made

    def make(nvidia):
        part = tensorflow(nvidia, [("Dense0/weight", np.asfortranarray(values))])
        return tuple(tensorflow(nvidia, [("lod", np.float32(1.5))], mapping=part) for _ in range(3))

    found = load_pickle(write(tmp_path / "a.pkl", make, 4))
    assert found.keys() == {"G", "D", "G_ema"}
    assert found["G_ema"].tensorflow
    assert found["G_ema"].kwargs == {"resolution": 8}
    assert torch.equal(found["G_ema"].tensors["mapping/Dense0/weight"], torch.arange(6.0).view(2, 3))
    assert found["D"].tensors["lod"] == 1.5
    assert np.dtype("f4").byteorder == "="  # the dtype itself was not turned


def legacy_storage(thing, *, zipped=False) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def touch(witness):
    return Reduced(os.system, f"touch {witness}")


def object_array(witness):
    array = np.empty(1, object)
    array[0] = touch(witness)
    return array


def with_buffer(nvidia, value):
    return {"G": persistent(nvidia, module_state(buffers={"x": value}))}


ATTACKS = {
    "a call": lambda nvidia, witness: ({"G": touch(witness)}, "names posix.system"),
    "a call deep in a module": lambda nvidia, witness: (with_buffer(nvidia, touch(witness)), "names posix.system"),
    "eval": lambda nvidia, witness: (Reduced(eval, f"open({str(witness)!r}, 'w')"), "names builtins.eval"),
    "a chain of attributes": lambda nvidia, witness: (
        Reduced(getattr, Reduced(__import__, "os"), "system"),
        "names builtins.getattr",
    ),
    "a stored tensor": lambda nvidia, witness: (
        with_buffer(nvidia, Reduced(torch.storage._load_from_bytes, legacy_storage(touch(witness)))),
        "a stored tensor that names posix.system",
    ),
    "a stored tensor in a zip archive": lambda nvidia, witness: (
        with_buffer(nvidia, Reduced(torch.storage._load_from_bytes, legacy_storage(touch(witness), zipped=True))),
        "a stored tensor that names posix.system",
    ),
    "an array of objects": lambda nvidia, witness: (with_buffer(nvidia, object_array(witness)), "numpy.dtype 'O8'"),
    "a numpy scalar of objects": lambda nvidia, witness: (
        with_buffer(nvidia, Reduced(np._core.multiarray.scalar, np.dtype("O"), pickle.dumps(touch(witness), 3))),
        "numpy.dtype 'O8'",
    ),
    "a class's new": lambda nvidia, witness: (io.StringIO("x"), "names _io.StringIO"),
    "another function of torch": lambda nvidia, witness: (
        Reduced(torch.load, str(witness)),
        "names torch.serialization.load",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("protocol", [3, 4])
def test_an_attack_is_refused_by_name_and_does_not_run(tmp_path, name, protocol):
    witness = tmp_path / "witness"
    expected = ""

    def make(nvidia):
        nonlocal expected
        thing, expected = ATTACKS[name](nvidia, witness)
        return thing

    message = refusal(write(tmp_path / "a.pkl", make, protocol))
    assert expected in message
    assert not witness.exists()


def test_the_attacks_would_work(tmp_path):
    """Against Python's own reader: otherwise their refusal shows nothing."""
    witness = tmp_path / "witness"
    pickle.loads(pickle.dumps({"G": touch(witness)}))
    assert witness.exists()
    witness.unlink()
    torch.load(io.BytesIO(legacy_storage(touch(witness))), weights_only=False)
    assert witness.exists()


def test_source_text_is_not_executed(tmp_path):
    witness = tmp_path / "witness"
    source = f"import os\nos.system('touch {witness}')\nopen({str(witness)!r}, 'w')\n"
    found = load_pickle(write(tmp_path / "a.pkl", lambda nvidia: {"G": network(nvidia, source=source)}))
    assert found["G"].tensors
    assert not witness.exists()


def op(name: str, argument: bytes = b"") -> bytes:
    code = next(o.code for o in pickletools.opcodes if o.name == name)
    return code.encode("latin-1") + argument


def text(value: str) -> bytes:
    return op("BINUNICODE", struct.pack("<I", len(value)) + value.encode())


BY_HAND = {
    "a dotted name": (text("collections") + text("OrderedDict.__init__.__globals__") + op("STACK_GLOBAL"), "__globals__"),
    "a name in a module's module": (text("torch_utils.persistence.sys") + text("exit") + op("STACK_GLOBAL"), "sys.exit"),
    "a newline in a name": (text("os") + text("sys\ntem") + op("STACK_GLOBAL"), r"os.sys\ntem"),
    "a number for a name": (op("BININT1", b"\1") + op("BININT1", b"\2") + op("STACK_GLOBAL"), "names ?"),
    "INST": (op("MARK") + text("true") + op("INST", b"os\nsystem\n"), "names os.system"),
    "INST of an allowed name": (op("MARK") + op("INST", b"builtins\nset\n"), "opcode INST"),
    "OBJ": (op("MARK") + op("GLOBAL", b"os\nsystem\n") + text("true") + op("OBJ"), "names os.system"),
    "OBJ of an allowed name": (op("MARK") + op("GLOBAL", b"builtins\nset\n") + op("OBJ"), "opcode OBJ"),
    "a persistent id": (op("PERSID", b"1\n"), "opcode PERSID"),
    "a binary persistent id": (op("BININT1", b"\1") + op("BINPERSID"), "opcode BINPERSID"),
    "an extension code": (op("EXT1", b"\7"), "opcode EXT1 7"),
    "a buffer out of band": (op("NEXT_BUFFER"), "opcode NEXT_BUFFER"),
    "state for an allowed function": (
        op("GLOBAL", b"torch._utils\n_rebuild_parameter\n") + op("EMPTY_DICT") + op("BUILD"),
        "sets the state of a Name",
    ),
    "state for a dictionary": (
        op("GLOBAL", b"collections\nOrderedDict\n") + op("EMPTY_TUPLE") + op("REDUCE") + op("EMPTY_DICT") + op("BUILD"),
        "sets the state of a dict",
    ),
    "a call of a text": (text("os.system") + op("EMPTY_TUPLE") + op("REDUCE"), "calls what is no function"),
    "a call of what is only named": (op("GLOBAL", b"numpy\nndarray\n") + op("EMPTY_TUPLE") + op("REDUCE"), "no function"),
    "a class with keywords": (
        op("GLOBAL", b"dnnlib.util\nEasyDict\n") + op("EMPTY_TUPLE") + op("MARK") + text("a") + text("b") + op("DICT")
        + op("NEWOBJ_EX"),
        "with keywords",
    ),
    "a list as a key": (op("EMPTY_DICT") + op("EMPTY_LIST") + op("NONE") + op("SETITEM"), "a list as a key"),
    "a nested tuple as a key": (
        op("EMPTY_DICT") + op("EMPTY_TUPLE") + op("TUPLE1") * 100_000 + op("NONE") + op("SETITEM"),
        "a tuple as a key",
    ),
    "items for a function": (op("GLOBAL", b"builtins\nset\n") + op("NONE") + op("APPEND"), "fills a Name"),
    "nesting without end": (op("EMPTY_LIST") + op("TUPLE1") * 100_000, "holds no networks"),
    "a number of networks": (op("BININT1", b"\1"), "holds no networks"),
    "a persistent function": (
        op("GLOBAL", b"torch_utils.persistence\n_reconstruct_persistent_obj\n") + op("EMPTY_DICT") + op("TUPLE1") + op("REDUCE"),
        "no module",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_a_pickle_written_by_hand_is_refused(tmp_path, name):
    content, expected = BY_HAND[name]
    path = tmp_path / "a.pkl"
    path.write_bytes(op("PROTO", b"\4") + content + op("STOP"))
    assert expected in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>404</html>",
        b"\x80\x04",
        b"\x80\x04.",
        op("PROTO", b"\4") + op("BINBYTES8", struct.pack("<Q", 2**60)) + b"abc.",
        op("PROTO", b"\4") + op("BINGET", b"\5") + op("STOP"),
        op("PROTO", b"\4") + op("TUPLE2") + op("STOP"),
        op("PROTO", b"\4") + op("REDUCE") + op("STOP"),
        op("PROTO", b"\4") + op("APPENDS") + op("STOP"),
        op("PROTO", b"\4") + op("EMPTY_DICT") + op("MARK") + op("NONE") + op("SETITEMS") + op("STOP"),
    ],
)
def test_what_is_no_pickle_is_refused(tmp_path, content):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    assert "truncated, or no pickle of networks" in refusal(path)


def test_any_truncation_is_refused(tmp_path):
    whole = write(tmp_path / "a.pkl", lambda nvidia: {"G": network(nvidia)}).read_bytes()
    path = tmp_path / "b.pkl"
    for end in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:end])
        refusal(path)


def test_any_flipped_byte_is_read_or_refused(tmp_path):
    """Never another error, and nothing imported."""
    whole = write(tmp_path / "a.pkl", lambda nvidia: {"G": network(nvidia)}).read_bytes()
    with contextlib.suppress(ValueError):
        load_pickle(tmp_path / "a.pkl")  # what torch imports when it is first used
    path, before = tmp_path / "b.pkl", set(sys.modules)
    for at in range(2, len(whole), 41):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with contextlib.suppress(ValueError):
            load_pickle(path)
    assert set(sys.modules) == before


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_pickle(tmp_path / "a.pkl")


def rebuilt(storage, offset, size, stride):
    return Reduced(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (3, (2,), (1,)),
        (0, (5,), (1,)),
        (0, (2, 2), (3, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (10**6, 10**6), (0, 0)),
        (0, (2, 2), (1,)),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, offset, size, stride):
    def make(nvidia):
        return with_buffer(nvidia, rebuilt(torch.arange(4.0).storage(), offset, size, stride))

    path = write(tmp_path / "a.pkl", make)
    assert "calls torch._utils._rebuild_tensor_v2 with arguments that make nothing" in refusal(path)


def test_a_damaged_storage_is_refused(tmp_path):
    def make(nvidia):
        return with_buffer(nvidia, Reduced(torch.storage._load_from_bytes, b"abc"))

    assert "calls torch.storage._load_from_bytes" in refusal(write(tmp_path / "a.pkl", make))


def test_an_array_shorter_than_its_shape_is_refused(tmp_path):
    def make(nvidia):
        return with_buffer(nvidia, np.arange(4, dtype=np.float32))

    path = write(tmp_path / "a.pkl", make)
    whole = path.read_bytes()
    at = whole.index(op("BININT1", b"\4") + op("TUPLE1"))
    path.write_bytes(whole[: at + 1] + b"\x40" + whole[at + 2 :])
    assert "truncated, or no pickle" in refusal(path)


def test_modules_that_hold_themselves_are_refused(tmp_path):
    rebuild = op("GLOBAL", b"torch_utils.persistence\n_reconstruct_persistent_obj\n")

    def meta(modules: bytes) -> bytes:
        state = op("EMPTY_DICT") + text("_modules") + modules + op("SETITEM")
        entries = text("type") + text("class") + text("class_name") + text("G") + text("state") + state
        return op("EMPTY_DICT") + op("MARK") + entries + op("SETITEMS")

    inner = op("EMPTY_DICT") + op("BINPUT", b"\0")
    module = rebuild + meta(inner) + op("TUPLE1") + op("REDUCE") + op("BINPUT", b"\1")
    knot = op("BINGET", b"\0") + text("a") + op("BINGET", b"\1") + op("SETITEM") + op("POP")
    content = op("EMPTY_DICT") + text("G") + module + knot + op("SETITEM")
    path = tmp_path / "a.pkl"
    path.write_bytes(op("PROTO", b"\4") + content + op("STOP"))
    assert "modules without end" in refusal(path)

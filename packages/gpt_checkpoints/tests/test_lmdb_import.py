"""Import of the released data's layout, written here by the lmdb package alone."""

import json
import pickle
import shutil
import sys

import lmdb
import numpy as np
import pytest
import torch
from triptych_gpt.cli import run as triptych_gpt
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.zoo import lmdb_import, lmdb_reader
from triptych_gpt.zoo.lmdb_import import ImportConfig, import_lmdb
from triptych_gpt.zoo.zoo import Zoo

LAYOUT = ParameterLayout({"fc1.weight": (3, 4), "fc1.bias": (3,), "fc2.weight": (2, 3), "fc2.bias": (2,)})
SIZES = [12, 3, 6, 2]
ITERATIONS, PLACES = 40, [(0, 0), (0, 7), (1, 1), (2, 40)]  # (epoch, iterations into it) of each checkpoint


def theta_of(run, checkpoint):
    return (0.1 * int(run) + checkpoint + np.arange(LAYOUT.size) / 64).astype(np.float32)


def keys_of(run):
    return [f"{run}/ep{epoch:03d}_it{iteration:05d}.pt" for epoch, iteration in PLACES]


def write_run(data, *runs, values=None, sizes=SIZES, places=PLACES, done=True, changes=None):
    """One environment with these runs, fused where there are several; `values` replace those of some keys."""
    folder = data / "_".join(runs)
    folder.mkdir(parents=True)
    content = {}
    with lmdb.open(str(folder), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for run in runs:
            metrics = {}
            for number, key in enumerate(keys_of(run)[: len(places)]):
                transaction.put(key.encode(), theta_of(run, number).tobytes())
                transaction.put(f"{key}_arch".encode(), np.array(sizes, dtype=np.float32).tobytes())
                loss = float(run) + number
                metrics[key] = {
                    "avg_train_loss": loss + 0.5, "avg_train_err": 4 * number, "avg_test_loss": loss,
                    "avg_test_err": 90.0 - number, **(changes or {}),
                }  # fmt: skip
            content[run] = {"checkpoints": metrics, "metadata": {"avg_test_loss": [], "optimal_test_loss": 0.0}}
        for key, value in (values or {}).items():
            transaction.put(key.encode(), value)
    (folder / "runs.json").write_text(json.dumps(content if len(runs) > 1 else content[runs[0]], sort_keys=True))
    if done:
        (folder / "DONE.txt").touch()
    return folder


@pytest.fixture
def data(tmp_path):
    """Eight runs in seven folders, two of them fused, and one without DONE.txt."""
    for run in ("10", "11", "2", "3", "30", "31"):
        write_run(tmp_path / "data", run)
    write_run(tmp_path / "data", "20", "21")
    write_run(tmp_path / "data", "99", done=False)
    return tmp_path / "data"


ORDER = ["10", "11", "2", "20", "21", "3", "30", "31"]  # as text, and a fused folder's by its name


def config(data, **options):
    settings = {
        "num_test_runs": 2,
        "validation_runs": 0,
        "checkpoints": len(PLACES),
        "cohort_runs": 4,
        "task": "tiny",
        **options,
    }
    return ImportConfig(lmdb=data, out=data.parent / "zoo", **settings)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_number_arrives(data):
    result = import_lmdb(config(data), LAYOUT)
    assert result["runs"] == {"train": 6, "test": 2}
    assert result["unfinished_folders"] == 1
    zoo = Zoo(data.parent / "zoo")
    assert zoo.verify() == []
    assert zoo.layout == LAYOUT
    assert zoo.runs.split.tolist() == ["train"] * 6 + ["test"] * 2
    assert [record.name for record in zoo.manifest.shards] == [
        "runs-00000000-00000003", "runs-00000004-00000005", "runs-00000006-00000007",
    ]  # fmt: skip
    names = zoo.index(["name"]).column("name").to_pylist()
    assert names == [run for run in ORDER for _ in PLACES]
    for row, run in enumerate(ORDER):
        for checkpoint in range(len(PLACES)):
            assert np.array_equal(zoo.theta([row], [checkpoint])[0], theta_of(run, checkpoint))
    runs, number = torch.tensor([float(run) for run in ORDER]).view(-1, 1), torch.arange(4.0)
    assert torch.equal(zoo.metrics("test_loss"), runs + number)
    assert torch.equal(zoo.metrics("minibatch_loss"), runs + number + 0.5)
    torch.testing.assert_close(zoo.metrics("test_error"), ((90 - number) / 100).expand(8, -1))
    torch.testing.assert_close(zoo.metrics("minibatch_error"), (number / 25).expand(8, -1))
    assert zoo.steps.tolist() == [[epoch * ITERATIONS + iteration for epoch, iteration in PLACES]] * 8


def test_validation_runs_come_before_the_released_test_runs(data):
    assert import_lmdb(config(data, validation_runs=3), LAYOUT)["runs"] == {"train": 3, "validation": 3, "test": 2}
    zoo = Zoo(data.parent / "zoo")
    assert zoo.runs.split.tolist() == ["train"] * 3 + ["validation"] * 3 + ["test"] * 2
    assert zoo.index(["name"]).column("name").to_pylist()[:: len(PLACES)] == ORDER
    with pytest.raises(ValueError, match="num_test_runs 2 and validation_runs 6: expected less than the 8 runs"):
        import_lmdb(config(data, validation_runs=6), LAYOUT)


TASK = """
import torch
from torch import nn
from triptych_gpt.tasks import Items, SupervisedTask

def points(part):
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(len(part)))
    return Items(inputs, (inputs[:, 0] > 0).long())

OWN = SupervisedTask("own", lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), points, epochs=2, batch_size=16)
"""


def test_an_imported_zoo_trains_evaluates_and_is_audited(tmp_path):
    """Every command that needs a validation split finds one, without a flag."""
    (tmp_path / "own.py").write_text(TASK)
    for run in range(20):
        write_run(
            tmp_path / "data", str(run), values={key: theta_of("0", i).tobytes() for i, key in enumerate(keys_of(run))}
        )
    zoo, gpt, task = str(tmp_path / "zoo"), str(tmp_path / "gpt"), ["--task", f"{tmp_path / 'own.py'}:OWN"]
    chosen = ["--num-test-runs", "4", "--checkpoints", str(len(PLACES))]
    assert triptych_gpt(["import", "--lmdb", str(tmp_path / "data"), *task, *chosen, "--out", zoo]) == 0
    assert Zoo(zoo).splits == {"train": 15, "validation": 1, "test": 4}
    shape = ["--width", "16", "--depth", "1", "--num-heads", "2", "--validation-networks", "1", "--device", "cpu"]
    pairs = ["--total-pairs", "32", "--batch-size", "16", "--warmup-pairs", "16", "--validation-inference-steps", "2"]
    assert triptych_gpt(["train", "--zoo", zoo, *task, *shape, *pairs, "--out", gpt]) == 0
    common = [*task, "--num-inference-steps", "2", "--model", gpt, "--zoo", zoo, "--device", "cpu"]
    small = ["--networks", "2", "--prompts", "3"]
    assert triptych_gpt(["evaluate", *common, *small, "--out", str(tmp_path / "evaluation")]) == 0
    assert triptych_gpt(["audit", *common, "--samples", "2", "--every", "4", "--out", str(tmp_path / "audit")]) == 0


def test_bad_runs_are_dropped_and_counted(data):
    large, infinite = theta_of("2", 1), theta_of("3", 2)
    large[4], infinite[5] = -10.5, np.inf
    write_run(data, "4", values={keys_of("4")[1]: large.tobytes()})
    write_run(data, "5", values={keys_of("5")[2]: infinite.tobytes()})
    write_run(data, "6", places=PLACES[:3])
    write_run(data, "7", changes={"avg_test_loss": float("nan")})
    result = import_lmdb(config(data), LAYOUT)
    assert result["dropped"] == {
        "weights beyond 10": 1,
        "weights that are not finite": 1,
        "metrics that are not finite": 1,
        "3 checkpoints": 1,
    }
    assert result["runs"] == {"train": 8, "test": 0}  # 6 and 7 are the last two
    zoo = Zoo(data.parent / "zoo")
    assert zoo.dropped == {
        8: "weights beyond 10",
        9: "weights that are not finite",
        10: "3 checkpoints",
        11: "metrics that are not finite",
    }
    assert zoo.index(["name"]).column("name").to_pylist()[:: len(PLACES)] == ORDER


def test_an_interrupted_import_goes_on_and_a_damaged_shard_is_made_again(data, monkeypatch):
    import_lmdb(config(data), LAYOUT)
    folder = data.parent / "zoo"
    whole = {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}
    for path in (folder / "shards").iterdir():
        path.unlink()
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "records")
    real, written = lmdb_import.write_shard, []

    def stop_at_the_second(zoo, name, *rest):
        if len(written) == 1:
            raise OSError("no space left")
        written.append(name)
        return real(zoo, name, *rest)

    monkeypatch.setattr(lmdb_import, "write_shard", stop_at_the_second)
    with pytest.raises(OSError, match="no space"):
        import_lmdb(config(data), LAYOUT)
    assert len(Zoo(folder)) == 4
    monkeypatch.setattr(
        lmdb_import, "write_shard", lambda zoo, name, *rest: written.append(name) or real(zoo, name, *rest)
    )
    import_lmdb(config(data), LAYOUT)
    assert written == ["runs-00000000-00000003", "runs-00000004-00000005", "runs-00000006-00000007"]
    assert {path.name: path.read_bytes() for path in (folder / "shards").iterdir()} == whole

    damaged = folder / "shards" / "runs-00000004-00000005.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"run triptych-gpt import --repair --lmdb .* --num-test-runs 2 .* --out"):
        Zoo(folder)
    import_lmdb(config(data, repair=True), LAYOUT)
    assert written[3:] == ["runs-00000004-00000005"]
    assert Zoo(folder).verify() == []


def test_another_import_into_the_same_folder_is_refused(data):
    import_lmdb(config(data), LAYOUT)
    with pytest.raises(ValueError, match=r"holds a run with num_test_runs=2 \(now 3\)"):
        import_lmdb(config(data, num_test_runs=3), LAYOUT)
    write_run(data, "4")
    with pytest.raises(ValueError, match="run_names="):  # another run would shift the split
        import_lmdb(config(data), LAYOUT)


class Bomb:
    """Unpickling this leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("padded", [False, True])
def test_a_pickle_is_never_run(data, tmp_path, monkeypatch, padded):
    """As a value under a checkpoint's key, of the wrong length or filled up to the right one, and under keys of its own."""
    monkeypatch.chdir(tmp_path)
    bomb, size = pickle.dumps(Bomb("exploded"), protocol=2), 4 * LAYOUT.size
    pickle.loads(bomb.ljust(size, b"."))
    (tmp_path / "exploded").unlink()  # it is one
    assert len(bomb) < size
    wide = bomb.ljust(-(-len(bomb) // 4) * 4, b".") if not padded else bomb.ljust(size, b".")
    write_run(data, "4", values={keys_of("4")[0]: wide, "__keys__": bomb, "4/zzz.pkl": bomb})
    if padded:
        import_lmdb(config(data), LAYOUT)  # numbers like any others
    else:
        with pytest.raises(
            ValueError, match=rf"4/ep000_it00000\.pt has {len(wide)} bytes, expected {size} \(23 float32\)"
        ) as e:
            import_lmdb(config(data), LAYOUT)
        one_line(e)
    assert not (tmp_path / "exploded").exists()


def test_a_pickled_runs_json_is_one_line_and_is_never_run(data, tmp_path):
    folder = write_run(data, "4")
    (folder / "runs.json").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match=r"4/runs\.json: not a list of checkpoints") as error:
        import_lmdb(config(data), LAYOUT)
    one_line(error)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a list of checkpoints"),
        ("[]", "not a list of checkpoints"),
        ('{"checkpoints": ["a"]}', "not a list of checkpoints"),
        ('{"metadata": {}}', "not a list of checkpoints"),
        ('{"checkpoints": {"4/last.pt": {}}}', "checkpoint '4/last.pt', expected RUN/epEEE_itIIIII.pt"),
    ],
)
def test_another_runs_json_is_one_line(data, content, message):
    (write_run(data, "4") / "runs.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        import_lmdb(config(data), LAYOUT)
    assert one_line(error).startswith(str(data / "4" / "runs.json"))


def test_a_missing_metric_or_key_or_file_is_one_line(data):
    folder = write_run(data, "4", changes={"avg_test_err": "low"})
    with pytest.raises(ValueError, match=r"4/ep000_it00000.pt has no number 'avg_test_err'") as error:
        import_lmdb(config(data), LAYOUT)
    one_line(error)
    listed = {
        key: dict.fromkeys(("avg_train_loss", "avg_train_err", "avg_test_loss", "avg_test_err"), 1)
        for key in keys_of("5")
    }
    (folder / "runs.json").write_text(json.dumps({"checkpoints": listed}))
    with pytest.raises(ValueError, match=r"no value for 5/ep000_it00000.pt_arch, which runs.json lists"):
        import_lmdb(config(data), LAYOUT)
    (folder / "runs.json").unlink()
    with pytest.raises(ValueError, match=r"runs\.json: missing; fetch this folder again, or move it away"):
        import_lmdb(config(data), LAYOUT)


@pytest.mark.parametrize(
    "spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x00" * len(b), lambda b: b[:100]]
)
def test_a_damaged_environment_is_one_line(data, spoil):
    path = data / "2" / "data.mdb"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"2(/data\.mdb)?: (truncated|damaged or not an LMDB environment)") as error:
        import_lmdb(config(data), LAYOUT)
    one_line(error)


def test_the_networks_layout_is_checked(data):
    other = ParameterLayout({"fc1.weight": (4, 3), "fc1.bias": (2,), "fc2.weight": (2, 3), "fc2.bias": (3,)})
    with pytest.raises(
        ValueError, match=r"parameters of sizes 12, 3, 6, 2, expected 12, 2, 6, 3; choose the --task"
    ) as error:
        import_lmdb(config(data), other)
    one_line(error)


def test_a_folder_that_holds_no_runs_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        import_lmdb(config(tmp_path / "nowhere"), LAYOUT)
    write_run(tmp_path / "data", "1", done=False)
    with pytest.raises(ValueError, match=r"no complete runs .*1 have no DONE.txt"):
        import_lmdb(config(tmp_path / "data"), LAYOUT)
    write_run(tmp_path / "data", "2")
    with pytest.raises(ValueError, match="num_test_runs 2: expected less than the 1 runs"):
        import_lmdb(config(tmp_path / "data"), LAYOUT)
    with pytest.raises(ValueError, match=r"no run could be used \(4 checkpoints: 1\)"):
        import_lmdb(config(tmp_path / "data", num_test_runs=0, checkpoints=5), LAYOUT)


def test_reading_leaves_the_data_as_it_was(data):
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file() and path.name != "lock.mdb"}
    for path in data.rglob("lock.mdb"):
        path.unlink()
    import_lmdb(config(data), LAYOUT)
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_without_the_package_the_extra_is_named(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match=r"pip install 'triptych-gpt\[lmdb\]'"):
        import_lmdb(config(data), LAYOUT)
    assert not (data.parent / "zoo").exists()


@pytest.mark.parametrize("option", [{"checkpoints": 1}, {"cohort_runs": 0}, {"num_test_runs": -1}])
def test_wrong_options_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} .*expected at least"):
        config(tmp_path, **option)


def test_no_byte_ends_this_process(data):
    """A wrong page number makes LMDB read beyond its file, which ends whatever process does so by SIGBUS."""
    path = data / "2" / "data.mdb"
    whole = path.read_bytes()
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))  # damage elsewhere is read by nobody
    outcomes = set()
    for place in used[np.random.default_rng(0).integers(0, len(used), 20)].tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            lmdb_reader.read_apart(path.parent, keys_of("2"), SIZES)
            outcomes.add("read")
        except ValueError as error:
            outcomes.add("refused" if str(error).isprintable() else str(error))
    assert outcomes == {"read", "refused"}
    path.write_bytes(whole)
    assert np.array_equal(lmdb_reader.read_apart(path.parent, keys_of("2"), SIZES)[1], theta_of("2", 1))

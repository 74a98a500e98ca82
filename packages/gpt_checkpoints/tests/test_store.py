"""The store: what is written is read back, by us and by other readers; damage is detected and reported in one line."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.zoo import store
from triptych_gpt.zoo.store import MANIFEST, CohortData, Manifest, shard_name, write_shard
from triptych_gpt.zoo.zoo import Zoo

LAYOUT = ParameterLayout({"0.weight": (3, 4), "0.bias": (3,)})
CHECKPOINTS, D = 6, LAYOUT.size
FACTS = {
    "task": "tiny",
    "layout": LAYOUT.to_json(),
    "checkpoints": CHECKPOINTS,
    "dtype": "float32",
    "metrics": {"loss": "lower", "accuracy": "higher"},
}


def cohort(runs, *, dropped=(), split="train", **settings):
    """Data whose every number identifies its run and checkpoint."""
    kept = [run for run in runs if run not in dropped]
    number = torch.tensor(kept).view(-1, 1) * 100.0 + torch.arange(CHECKPOINTS)
    theta = number.unsqueeze(-1) + torch.arange(D) / 32
    steps = torch.arange(CHECKPOINTS).expand(len(kept), -1) * 7
    metrics = {"loss": 1 / (1 + number), "accuracy": number / 1000}
    settings = {"split": split, "seed": 5, **settings}
    return CohortData(kept, theta, steps, metrics, settings, dict.fromkeys(dropped, "non-finite"))


def make_zoo(folder, *cohorts, **facts):
    manifest = Manifest.create(folder, {**FACTS, **facts})
    for data in cohorts:
        manifest.commit(written(folder, data, manifest.facts["dtype"]))
    return manifest


def written(folder, data, dtype="float32"):
    return write_shard(folder, shard_name(sorted([*data.runs, *data.dropped])), data, dtype)


@pytest.fixture
def folder(tmp_path):
    """Ten runs, 3 and 8 dropped, the shards committed out of order."""
    make_zoo(tmp_path, cohort(range(6, 10), dropped=[8], split="test"), cohort(range(6), dropped=[3]))
    return tmp_path


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_other_readers_read_a_shard(folder):
    name = folder / "shards" / "runs-00000000-00000005"
    data = cohort(range(6), dropped=[3])
    assert torch.equal(load_file(name.with_suffix(".safetensors"))["theta"], data.theta)
    rows = pq.read_table(name.with_suffix(".parquet")).to_pylist()
    assert len(rows) == 5 * CHECKPOINTS
    assert rows[3 * CHECKPOINTS + 2] == {
        "run": 4, "checkpoint": 2, "step": 14, "loss": pytest.approx(1 / 403), "accuracy": pytest.approx(0.402),
        "split": "train", "seed": 5,
    }  # fmt: skip


def test_runs_are_a_table_in_run_order(folder):
    zoo = Zoo(folder)
    assert zoo.runs.run.tolist() == [0, 1, 2, 4, 5, 6, 7, 9]
    assert zoo.splits == {"train": 5, "test": 3}
    assert zoo.runs_in("test").tolist() == [5, 6, 7]
    assert zoo.dropped == {3: "non-finite", 8: "non-finite"}
    assert zoo.metrics("accuracy")[:, 1].tolist() == pytest.approx([(run * 100 + 1) / 1000 for run in zoo.runs.run])
    assert torch.equal(zoo.steps, (torch.arange(CHECKPOINTS) * 7).expand(8, -1))
    index = zoo.index(["run", "checkpoint", "split"]).to_pandas()
    assert index.run.tolist() == np.repeat(zoo.runs.run, CHECKPOINTS).tolist()
    assert index.split.tolist() == ["train"] * 30 + ["test"] * 18


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_theta_gathers_any_rows_in_any_order(tmp_path, dtype):
    parts = [cohort(range(6, 10), dropped=[8]), cohort(range(6), dropped=[3])]
    make_zoo(tmp_path, *parts, dtype=dtype)
    whole = torch.cat([parts[1].theta, parts[0].theta])
    if dtype == "bfloat16":
        whole = whole.bfloat16().float()
    rows = torch.randint(8, (200,), generator=torch.Generator().manual_seed(0))
    checkpoints = torch.randint(CHECKPOINTS, (200,), generator=torch.Generator().manual_seed(1))
    zoo, out = Zoo(tmp_path), torch.full((200, D), torch.nan)
    assert torch.equal(zoo.theta(rows, checkpoints), whole[rows, checkpoints])
    assert zoo.theta(rows, checkpoints, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, whole[rows, checkpoints])
    assert zoo.theta([], []).shape == (0, D)


def test_theta_copies_only_the_given_rows(tmp_path):
    layout = ParameterLayout({"weight": (1000, 100)})
    manifest = Manifest.create(tmp_path, {**FACTS, "layout": layout.to_json()})
    theta = torch.zeros(20, CHECKPOINTS, layout.size)
    steps = torch.zeros(20, CHECKPOINTS, dtype=torch.long)
    manifest.commit(written(tmp_path, CohortData(range(20), theta, steps, {}, {"split": "train"}, {})))
    zoo = Zoo(tmp_path)

    def anonymous_bytes():
        status = Path("/proc/self/status").read_text().split()
        return int(status[status.index("RssAnon:") + 1]) * 1024

    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    del theta
    before, opened = anonymous_bytes(), open_files()
    rows = zoo.theta(range(20), [1] * 20)
    assert anonymous_bytes() - before < 2 * rows.nbytes < theta_bytes(zoo) / 2
    assert open_files() == opened  # a thousand shards do not hold a thousand files open


def theta_bytes(zoo):
    return sum(record.theta.bytes for record in zoo.manifest.shards)


def test_indices_outside_the_zoo_are_refused(folder):
    zoo = Zoo(folder)
    with pytest.raises(IndexError, match=r"row 8: expected 0\.\.7"):
        zoo.theta([0, 8], [0, 0])
    with pytest.raises(IndexError, match=r"checkpoint -1: expected 0\.\.5"):
        zoo.theta([0, 7], [0, -1])
    with pytest.raises(ValueError, match=r"run 3: dropped .*non-finite"):
        zoo.row_of(3)
    with pytest.raises(ValueError, match=r"run 10: not in .* runs 0\.\.9, 8 of them"):
        zoo.row_of(10)
    with pytest.raises(ValueError, match=r"split 'valid': no runs .* train .5 runs"):
        zoo.runs_in("valid")
    with pytest.raises(ValueError, match="metric 'error': expected one of loss, accuracy"):
        zoo.metrics("error")
    with pytest.raises(ValueError, match="no column 'colour'; expected one of run, checkpoint, step, loss"):
        zoo.index(["colour"])


def test_a_bfloat16_shard_is_written_without_a_second_copy(tmp_path):
    theta = torch.randn(16, 50, 2000, generator=torch.Generator().manual_seed(0))
    steps = torch.zeros(16, 50, dtype=torch.long)
    data = CohortData(range(16), theta, steps, {}, {"split": "train"}, {})
    tracemalloc.start()
    record = write_shard(tmp_path, "whole", data, "bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    done = load_file(tmp_path / "shards" / "whole.safetensors")["theta"]
    assert torch.equal(done, theta.bfloat16())
    assert record.theta.bytes == done.nbytes + 128  # length and header
    assert peak < theta.nbytes / 8


def test_a_cohort_of_dropped_runs_is_a_record_without_files(tmp_path):
    make_zoo(tmp_path, cohort(range(2), dropped=[0, 1]))
    zoo = Zoo(tmp_path)
    assert (len(zoo), zoo.splits, zoo.dropped) == (0, {}, {0: "non-finite", 1: "non-finite"})
    assert not (tmp_path / "shards").exists()
    assert zoo.verify() == []
    assert zoo.metrics("loss").shape == (0, CHECKPOINTS)
    assert zoo.index().num_rows == 0


def test_settings_of_each_run_and_of_the_cohort_are_columns(tmp_path):
    other = cohort([2], learning_rate=1, betas=None, initialiser="orthogonal", source=np.array(["c"]))
    first = cohort(range(2), learning_rate=0.1, betas=[0.9, 0.99], initialiser="default", source=np.array(["a", "b"]))
    make_zoo(tmp_path, first, other)
    rows = Zoo(tmp_path).index().to_pandas().iloc[::CHECKPOINTS]
    assert rows.source.tolist() == ["a", "b", "c"]
    assert rows.learning_rate.tolist() == [0.1, 0.1, 1]
    assert rows.initialiser.tolist() == ["default", "default", "orthogonal"]
    assert rows.betas.tolist()[:2] == ["[0.9, 0.99]"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": [0, 2]}, "consecutive"),
        ({"runs": [1, 0]}, "ascending"),
        ({"settings": {}}, "split"),
        ({"settings": {"split": "train", "loss": 1}}, "column loss: named twice"),
        ({"settings": {"split": "train", "source": np.array(["a"])}}, "one value for each of 2 runs"),
        ({"steps": torch.zeros(2, 5, dtype=torch.long)}, "steps|shape|type"),
    ],
)
def test_data_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(Exception, match=message):
        CohortData(**{**vars(cohort(range(2))), **change})


@pytest.mark.parametrize("name", ["metrics", "layout"])
def test_a_zoo_has_metrics_and_parameters(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} .*: expected one entry or more"):
        make_zoo(tmp_path, **{name: type(FACTS[name])()})


def test_a_zoo_only_grows(folder):
    manifest = Manifest.read(folder)
    before = (folder / MANIFEST).read_bytes()
    record = written(folder, cohort(range(6), dropped=[3]))
    with pytest.raises(ValueError, match=r"runs 0\.\.5 are there already") as error:
        manifest.commit(record)
    one_line(error)
    with pytest.raises(ValueError, match=r"runs 4\.\.7 are there already"):  # even to replace: other runs
        manifest.commit(written(folder, cohort(range(4, 8))), replace=True)
    with pytest.raises(ValueError, match="a zoo is there already"):
        Manifest.create(folder, FACTS)
    assert (folder / MANIFEST).read_bytes() == before
    manifest.commit(record, replace=True)
    assert (folder / MANIFEST).read_bytes() == before  # the same runs, the same bytes
    manifest.commit(written(folder, cohort([10])))
    assert Zoo(folder).runs.run.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10]


def test_files_without_a_record_are_ignored(folder):
    written(folder, cohort(range(10, 12)))
    (folder / "shards" / "runs-00000012-00000013.safetensors.partial").write_bytes(b"half")
    zoo = Zoo(folder)
    assert len(zoo) == 8
    assert zoo.verify() == []


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_a_truncated_or_missing_file_is_reported_at_opening(folder, suffix):
    path = folder / "shards" / f"runs-00000006-00000009.{suffix}"
    size = path.stat().st_size
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=rf"{suffix}: 100 bytes, the manifest says {size:,}") as error:
        Zoo(folder)
    assert one_line(error).endswith(f"run triptych-gpt collect tiny --repair --out {folder}")
    path.unlink()
    with pytest.raises(ValueError, match=f"{suffix}: missing; run triptych-gpt collect tiny --repair"):
        Zoo(folder)


@pytest.mark.parametrize("at", [3, 60, -1])
@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_one_altered_byte_is_detected_and_its_file_named(folder, suffix, at):
    path = folder / "shards" / f"runs-00000000-00000005.{suffix}"
    flip(path, at)
    other = folder / "shards" / "runs-00000006-00000009.safetensors"
    zoo = Zoo(folder)
    flip(other, 500)
    assert [str(damage) for damage in zoo.verify()] == [
        f"{path}: contents differ from the manifest's checksum",
        f"{other}: contents differ from the manifest's checksum",
    ]
    with pytest.raises(ValueError, match=f"{suffix}: contents differ") as error:
        zoo.verify_once()
    assert one_line(error).endswith(f"run triptych-gpt collect tiny --repair --out {folder}")


def test_whole_shards_are_read_once_and_changed_ones_again(folder, monkeypatch):
    read = []
    real = store._problem
    monkeypatch.setattr(store, "_problem", lambda path, *rest: read.append((path.name, *rest[1:])) or real(path, *rest))

    def contents_read():
        read.clear()
        Zoo(folder).verify_once()
        return sorted(name for name, checksum in read if checksum)

    files = sorted(path.name for path in (folder / "shards").iterdir())
    assert contents_read() == files
    assert contents_read() == []
    path = folder / "shards" / files[0]
    os.utime(path)
    assert contents_read() == [path.name]
    monkeypatch.setenv("RANK", "1")  # which waits for the main one
    flip(path, 60)
    assert contents_read() == []


def test_a_zoo_that_cannot_be_written_to_is_verified_every_time(folder):
    (folder / ".verified.json").mkdir()
    Zoo(folder).verify_once()
    flip(folder / "shards" / "runs-00000000-00000005.safetensors", 60)
    with pytest.raises(ValueError, match="contents differ"):
        Zoo(folder).verify_once()


def test_weights_that_are_not_finite_are_refused_though_their_checksum_is_right(folder):
    manifest = Manifest.read(folder)
    record = manifest.shards[0]
    path = folder / "shards" / f"{record.name}.safetensors"
    theta = load_file(path)["theta"]
    theta[0, 1, 0] = float("nan")
    written = store._write(path, store._theta_file(theta, "float32"))
    manifest.commit(replace(record, theta=written), replace=True)
    with pytest.raises(ValueError, match=r"runs-0.*\.safetensors: tensor theta has values that are not finite"):
        Zoo(folder).verify_once()


# --- a manifest that was lost


def spoil_each_byte(path):
    """The file missing, cut, and with one bit of a few bytes flipped, one after another."""
    whole = path.read_bytes()
    yield path.unlink()
    for at in range(0, len(whole), 37):
        path.write_bytes(whole)
        yield flip(path, at)
    for content in (b"", whole[: len(whole) // 2], b"\x00" * len(whole)):
        yield path.write_bytes(content)


def test_a_lost_or_damaged_manifest_is_made_again_byte_for_byte(folder):
    path = folder / MANIFEST
    whole = path.read_bytes()
    for _ in spoil_each_byte(path):
        with pytest.raises(ValueError, match=r"manifest.json: .*; run triptych-gpt collect tiny --repair") as error:
            Zoo(folder)
        assert "delete" not in one_line(error)
        Manifest.recover(folder).save()
        assert path.read_bytes() == whole
    assert Zoo(folder).verify() == []


def test_a_lost_or_damaged_record_is_made_again_and_never_believed(folder):
    path = folder / "records" / "runs-00000000-00000005.json"
    whole, manifest = path.read_bytes(), (folder / MANIFEST).read_bytes()
    for _ in spoil_each_byte(path):
        (folder / MANIFEST).unlink()
        assert [record.first for record in Manifest.recover(folder).shards] == [6]  # the other shard's
        (folder / MANIFEST).write_bytes(manifest)
        Manifest.recover(folder).save()
        assert path.read_bytes() == whole


def test_a_recovered_manifest_lists_what_the_shards_were(folder):
    """A shard that is damaged, too, is damaged in the manifest that is made again; one of dropped runs has a record alone."""
    Manifest.read(folder).commit(written(folder, cohort(range(10, 12), dropped=[10, 11])))
    whole = (folder / MANIFEST).read_bytes()
    flip(folder / "shards" / "runs-00000000-00000005.safetensors", 500)
    (folder / MANIFEST).unlink()
    Manifest.recover(folder).save()
    assert (folder / MANIFEST).read_bytes() == whole
    assert [damage.shard for damage in Zoo(folder).verify()] == ["runs-00000000-00000005"]


def test_records_of_another_zoo_and_copies_are_no_part_of_it(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    make_zoo(other, cohort(range(20, 22)), task="another")
    whole = (folder / MANIFEST).read_bytes()
    records = folder / "records"
    (records / "copy.json").write_bytes((records / "runs-00000000-00000005.json").read_bytes())
    (folder / MANIFEST).unlink()
    Manifest.recover(folder).save()
    assert (folder / MANIFEST).read_bytes() == whole
    (folder / MANIFEST).unlink()
    (records / "runs-00000020-00000021.json").write_bytes((other / "records/runs-00000020-00000021.json").read_bytes())
    with pytest.raises(
        ValueError, match="runs-00000000-00000005 and runs-00000020-00000021 are of different zoos"
    ) as e:
        Manifest.recover(folder)
    one_line(e)


def test_a_zoo_without_records_as_earlier_versions_made_them_is_read_and_gets_them(folder):
    whole, records = (folder / MANIFEST).read_bytes(), folder / "records"
    made = {path.name: path.read_bytes() for path in records.iterdir()}
    shutil.rmtree(records)
    assert len(Zoo(folder)) == 8
    Manifest.recover(folder).save()
    assert {path.name: path.read_bytes() for path in records.iterdir()} == made
    shutil.rmtree(records)
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"shards without their manifest.json and records/; put one of them back") as e:
        Manifest.recover(folder)
    one_line(e)
    assert Manifest.recover(folder / "nowhere") is None
    (folder / MANIFEST).write_bytes(whole)
    assert len(Zoo(folder)) == 8


def test_the_order_of_commits_leaves_no_trace(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    make_zoo(other, cohort(range(6), dropped=[3]), cohort(range(6, 10), dropped=[8], split="test"))
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (other / path.relative_to(folder)).read_bytes()


def test_an_unreadable_file_is_one_line_where_it_is_first_read(folder):
    for name, at in (("runs-00000000-00000005.safetensors", 3), ("runs-00000000-00000005.parquet", -1)):
        flip(folder / "shards" / name, at)
    zoo = Zoo(folder)
    with pytest.raises(ValueError, match=r"00000005.safetensors: damaged; run triptych-gpt collect") as error:
        zoo.theta([0], [0])
    one_line(error)
    with pytest.raises(ValueError, match=r"00000005.parquet: damaged; run triptych-gpt collect") as error:
        zoo.metrics("loss")
    one_line(error)
    assert zoo.theta([7], [0])[0, 0] == 900  # the other shard is whole


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "[1, 2]", "input should be an object"),
        (lambda text: '{"kind": "latent cache", "format": 1}', "not the manifest of a checkpoint zoo"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2, this version reads 1"),
        (lambda text: text.replace('"task": "tiny"', '"task": "tinY"'), "altered since it was written"),
        (lambda text: text.replace('"first": 6', '"first": 7'), "altered since it was written"),
        (lambda text: text.replace('"shards"', '"shard"'), "altered since it was written"),
        (lambda text: "\x00" * len(text), "not JSON"),
    ],
)
def test_a_manifest_that_is_not_as_written_is_one_line(folder, spoil, message):
    path = folder / MANIFEST
    path.write_text(spoil(path.read_text()))
    for remedy in ("run triptych-gpt collect tiny --repair", ""):
        with pytest.raises(ValueError, match=f"{message}.*{remedy}") as error:
            Zoo(folder)
        assert one_line(error).startswith(f"{path}: ")
        shutil.rmtree(folder / "records", ignore_errors=True)


def test_a_folder_without_a_zoo_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no zoo .*triptych-gpt collect --out") as error:
        Zoo(tmp_path / "nowhere")
    one_line(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoints": 1}, "checkpoints 1: expected at least 2"),
        ({"dtype": "float16"}, "dtype 'float16': expected one of float32, bfloat16"),
        ({"metrics": {"loss": "down"}}, "metrics.loss: 'down': input should be 'lower' or 'higher'"),
        ({"shards": []}, "fact 'shards': the manifest's own name"),
    ],
)
def test_facts_are_checked_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Manifest.create(tmp_path, {**FACTS, **change})
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_stays_readable_for_other_programs(folder):
    content = json.loads((folder / MANIFEST).read_text())
    assert content["format"] == 1
    assert [record["first"] for record in content["shards"]] == [0, 6]
    assert content["shards"][1]["dropped"] == {"8": "non-finite"}


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from triptych_gpt.zoo.store import Manifest
from triptych_gpt.zoo.store import CohortData, shard_name, write_shard
folder, limit, runs = Path(sys.argv[1]), int(sys.argv[2]), range(10, 14)
manifest = Manifest.read(folder)
data = CohortData(runs, torch.ones(4, 6, 15), torch.zeros(4, 6, dtype=torch.long), {}, {"split": "train"}, {})
record = None if limit > 1000 else write_shard(folder, "first", data, "float32")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    record = record or write_shard(folder, shard_name(runs), data, "float32")
    manifest.commit(record)
except OSError as error:
    print(error, len(manifest.shards), sep="\\n")
"""


@pytest.mark.parametrize(("limit", "file"), [(1400, "runs-00000010-00000013.safetensors"), (200, "manifest.json")])
def test_a_full_disk_is_one_line_and_loses_nothing(folder, limit, file):
    before = {path.name: path.read_bytes() for path in folder.rglob("runs-*")}
    manifest = (folder / MANIFEST).read_bytes()
    command = [sys.executable, "-c", FULL_DISK, folder, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    message, committed = done.stdout.splitlines()
    assert f"{file}: cannot be written (File too large); make room" in message
    assert committed == "2"
    assert (folder / MANIFEST).read_bytes() == manifest
    assert {path.name: path.read_bytes() for path in folder.rglob("runs-*")} == before  # no half file either
    assert Zoo(folder).verify() == []

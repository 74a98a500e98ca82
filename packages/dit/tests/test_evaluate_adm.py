"""`triptych-dit evaluate REFERENCE.npz SAMPLES.npz` against independent computation, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from triptych_common.metrics import load_inception
from triptych_common.testing import OFFLINE, random_inception_weights, run_cli
from triptych_dit.evaluate import EvaluateConfig, evaluate
from triptych_dit.testing import run_dit

REFERENCES, SAMPLES = 8, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights, and two sets of images: smooth ones, and the same kind with noise."""
    folder = tmp_path_factory.mktemp("adm")
    random_inception_weights(folder / "weights.pth")
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (REFERENCES + SAMPLES, 3, 3, 3)).repeat(8, 1).repeat(8, 2)
    noisy = np.clip(smooth + rng.normal(0, 25, smooth.shape), 0, 255).astype(np.uint8)
    np.savez(folder / "reference.npz", arr_0=smooth[:REFERENCES].astype(np.uint8))
    np.savez_compressed(folder / "samples.npz", arr_0=noisy[REFERENCES:], arr_1=np.arange(SAMPLES))
    return folder


@pytest.fixture(scope="module")
def features(folder):
    """(pool, spatial) of both files, by direct calls of the network; float64."""
    inception = load_inception(folder / "weights.pth")
    found = {}
    for name in ("reference", "samples"):
        images = torch.from_numpy(np.load(folder / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2)
        found[name] = [x.double() for x in inception(images)]
    return inception, found


def suite(folder, reference="reference.npz", samples="samples.npz", out="out", **options):
    settings = {"inception": folder / "weights.pth", "repeats": 0, "device": "cpu", **options}
    return evaluate(EvaluateConfig(files=(folder / reference, folder / samples), out=folder / out, **settings))


def frechet_of_few(a, b):
    """By singular values: with centred rows A and B, tr((S_a S_b)^(1/2)) is the nuclear norm of A B^T, normalised."""
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + sum(x.square().sum() for x in centred) - 2 * cross)


def covered(points, by, k=3):
    radii = torch.cdist(by, by).sort(dim=1).values[:, k]
    return float((torch.cdist(points, by) <= radii).any(1).double().mean())


def test_the_command_writes_the_suites_scores(folder, features):
    files = [str(folder / name) for name in ("reference.npz", "samples.npz")]
    options = ["--inception", str(folder / "weights.pth"), "--repeats", "20", "--batch-size", "4", "--device", "cpu"]
    done = run_dit("evaluate", *files, *options, "--out", folder / "cli", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    inception, found = features
    (real, real_spatial), (fake, fake_spatial) = found["reference"], found["samples"]
    probabilities = (fake @ inception.network.fc.weight.double().T).softmax(1)
    marginal = probabilities.mean(0)
    expected = {
        "fid": frechet_of_few(real, fake),
        "sfid": frechet_of_few(real_spatial, fake_spatial),
        "inception_score": float((probabilities * (probabilities / marginal).log()).sum(1).mean().exp()),
        "precision": covered(fake, real),
        "recall": covered(real, fake),
    }
    for name, value in expected.items():
        score = printed["scores"][name]
        assert score["value"] == pytest.approx(value, rel=2e-3), name
        assert score["low"] <= score["value"] <= score["high"]
    assert printed["scores"]["fid"]["low"] < printed["scores"]["fid"]["value"]
    assert printed["reference"] | {"arr_0_crc32": None} == {
        "path": files[0], "images": REFERENCES, "statistics": False, "arr_0_crc32": None
    }  # fmt: skip
    assert printed["samples"]["images"] == SAMPLES
    assert printed["instruments"] == {"inception": inception.sha256}
    assert any("below 10,000" in note for note in printed["notes"])
    assert any("not the published" in note for note in printed["notes"])
    written = json.loads((folder / "cli" / "scores.json").read_text())
    assert written["scores"] == printed["scores"]
    assert "evaluate" in written["command"]
    for line in (f"samples     {files[1]}: {SAMPLES} images", "sFID", "precision"):
        assert line in done.stderr


def test_a_set_against_itself_is_at_distance_zero_and_covered(folder, capsys):
    scores = suite(folder, samples="reference.npz")["scores"]
    assert scores["fid"]["value"] == pytest.approx(0, abs=1e-3)
    assert scores["sfid"]["value"] == pytest.approx(0, abs=1e-3)
    assert scores["precision"]["value"] == scores["recall"]["value"] == 1.0
    assert f"reference   {folder / 'reference.npz'}: {REFERENCES} images" in capsys.readouterr().out


def test_a_reference_of_statistics_alone(folder, features, capsys):
    _, found = features
    (real, _), (fake, _) = found["reference"], found["samples"]
    np.savez(folder / "statistics.npz", mu=real.mean(0).float().numpy(), sigma=np.cov(real.numpy().T))
    result = suite(folder, reference="statistics.npz")
    assert result["scores"]["fid"]["value"] == pytest.approx(frechet_of_few(real, fake), rel=2e-3)
    assert result["scores"]["inception_score"]["value"] > 1
    assert [name for name, score in result["scores"].items() if score is None] == ["sfid", "precision", "recall"]
    out = capsys.readouterr().out
    assert f"reference   {folder / 'statistics.npz'}: statistics" in out
    assert "recall      not available: the reference holds no images" in out
    assert "sFID        not available: the reference holds neither images nor mu_s and sigma_s" in out


@pytest.mark.parametrize(("arrays", "message"), [
    ({"images": np.zeros((9, 8, 8, 3), np.uint8)}, r"bad.npz: holds images; expected images in arr_0"),
    ({"arr_0": np.zeros((9, 8, 8, 3), np.float32)}, r"bad.npz: arr_0 is float32 \(9, 8, 8, 3\), expected uint8"),
    ({"arr_0": np.zeros((9, 28, 28, 4), np.uint8)}, r"bad.npz: arr_0 is uint8 \(9, 28, 28, 4\), expected uint8"),
    ({"arr_0": np.zeros((3, 8, 8, 3), np.uint8)}, r"bad.npz: 3 images; precision and recall with k=3 need more than 3"),
])  # fmt: skip
def test_a_bad_file_is_refused_before_anything_is_computed(arrays, message, folder):
    np.savez(folder / "bad.npz", **arrays)
    for files in ({"samples": "bad.npz"}, {"reference": "bad.npz"}):
        with pytest.raises(ValueError, match=message):
            suite(folder, **files, inception=folder / "absent.pth")


def test_a_damaged_file_is_refused(folder):
    (folder / "cut.npz").write_bytes((folder / "samples.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cut\.npz: not an npz file, or a damaged one"):
        suite(folder, samples="cut.npz")


def test_absent_weights_offline_are_one_clear_line(folder, tmp_path):
    offline = {**OFFLINE, "TRIPTYCH_DATA": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    files = [str(folder / name) for name in ("reference.npz", "samples.npz")]
    done = run_cli("triptych_dit.cli", "evaluate", *files, env=offline)
    where = tmp_path / "inception" / "weights-inception-2015-12-05-6726825d.pth"
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"elsewhere and put it at {where}, or name it with --inception" in done.stderr


@pytest.mark.parametrize(("settings", "message"), [
    ({"files": 1}, "files given: 1, expected REFERENCE.npz SAMPLES.npz"),
    ({"files": 3}, "files given: 3, expected"),
    ({"files": 2, "samples": "x.npz"}, "--samples has a meaning only without REFERENCE.npz"),
    ({"files": 2, "repeats": 1}, "repeats 1: expected at least 2, or 0"),
    ({"files": 2, "batch_size": 0}, "batch_size 0: expected at least 1"),
    ({"repeats": 5}, "--repeats has a meaning only with REFERENCE.npz"),
    ({"batch_size": 5}, "--batch-size has a meaning only with REFERENCE.npz"),
])  # fmt: skip
def test_options_of_the_other_kind_are_refused(settings, message, tmp_path):
    options = {name: tmp_path / value if isinstance(value, str) else value for name, value in settings.items()}
    options["files"] = tuple(tmp_path / f"{i}.npz" for i in range(settings.get("files", 0)))
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**options)


def test_folders_are_scored_as_their_images_in_files_would_be(folder):
    with np.load(folder / "reference.npz") as arrays:
        images = arrays["arr_0"]
    for i, image in enumerate(images):
        (folder / "own" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "own" / f"{i % 2}" / f"{i:04d}.png")
    (folder / "own" / "0" / "broken.png").write_bytes(b"no picture")
    options = ("--inception", folder / "weights.pth", "--repeats", 0, "--device", "cpu", "--out", folder / "scored")
    done = run_dit("evaluate", "--reference", folder / "own", "--samples", folder / "samples.npz", *options)
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads((folder / "scored/scores.json").read_text()), suite(folder)
    for name in ("fid", "sfid", "precision", "recall"):
        assert ours["scores"][name]["value"] == pytest.approx(theirs["scores"][name]["value"], rel=1e-4)
    assert f"pictures of {folder / 'own'} are reduced and centre-cropped to 24x24" in ours["notes"]
    assert ours["reference"]["images"] == len(images)
    assert "left out 1 of 9 images" in done.stdout
    assert len(json.loads((folder / "scored/skipped.json").read_text())) == 1
    done = run_dit("evaluate", folder / "own", folder / "own", *options)
    assert done.returncode == 0, done.stderr
    same = json.loads((folder / "scored/scores.json").read_text())["scores"]
    assert same["fid"]["value"] == pytest.approx(0, abs=1e-3)

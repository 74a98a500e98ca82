"""Videos: their frames as other software reads them."""

import io
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from triptych_common.video import course, ends, import_av, write_video


def test_a_course_stops_where_it_should():
    assert course(3, 2, loop=False).tolist() == [[0, 1, 0], [0, 1, 0.5], [1, 2, 0], [1, 2, 0.5], [2, 2, 0]]
    assert course(2, 2, loop=True).tolist() == [[0, 1, 0], [0, 1, 0.5], [1, 0, 0], [1, 0, 0.5]]


def test_the_ends_of_a_leg_are_its_stops():
    stops = torch.arange(6.0).view(3, 2)
    here, there = ends(stops, course(3, 2, loop=True))
    assert here[:, 0].tolist() == [0, 0, 2, 2, 4, 4]
    assert there[:, 0].tolist() == [2, 2, 4, 4, 0, 0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(7, 11), (257, 301)])  # enlarged; odd sides
def test_an_mp4_shows_the_frames(channels, size, tmp_path):
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (6, channels, 3, 4), generator=rng).float()
    frames = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").to(torch.uint8)
    write_video(tmp_path / "x.mp4", frames, fps=12)
    with av.open(str(tmp_path / "x.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 12
    scale = max(1, -(-256 // min(size)))
    height, width = size[0] * scale, size[1] * scale
    assert len(shown) == 6
    assert shown[0].shape == (height + height % 2, width + width % 2, 3)
    centres = slice(scale // 2, None, scale)
    for frame, image in zip(shown, frames, strict=True):
        expected = image.expand(3, -1, -1).permute(1, 2, 0).numpy().astype(int)
        got = frame[:height, :width][centres, centres].astype(int)
        assert np.abs(got - expected).mean() < 6  # colour is stored at half the resolution


@pytest.mark.parametrize("loop", [False, True])
def test_a_gif_shows_the_frames(loop, tmp_path):
    frames = (torch.arange(5)[:, None, None, None] * 50).expand(5, 1, 8, 8).to(torch.uint8)
    write_video(tmp_path / "x.gif", frames, fps=10, loop=loop)
    film = Image.open(io.BytesIO((tmp_path / "x.gif").read_bytes()))
    assert film.n_frames == 5
    assert film.size == (256, 256)
    assert ("loop" in film.info) == loop
    for i in range(5):
        film.seek(i)
        assert film.info["duration"] == 100
        assert film.convert("L").getpixel((99, 9)) == pytest.approx(50 * i, abs=2)


def test_without_pyav_a_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'triptych-common\[video\]'; gif needs none"):
        import_av()
    write_video(tmp_path / "x.gif", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), fps=10)  # a GIF needs no PyAV

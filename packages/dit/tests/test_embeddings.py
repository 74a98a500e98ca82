import math

import pytest
import torch
from triptych_dit.model import frequency_embedding, sincos_position_embedding


def test_position_embedding_equals_written_out_layout_on_a_rectangle():
    height, width, dim = 3, 5, 8
    table = sincos_position_embedding(height, width, dim)
    assert table.shape == (height * width, dim)
    for row in range(height):
        for column in range(width):
            expected = []
            for position in (column, row):  # columns come first
                angles = [position * 10000 ** (-i / (dim / 4)) for i in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row * width + column], torch.tensor(expected), rtol=0, atol=1e-7)


def test_frequency_embedding_equals_written_out_layout():
    t = torch.tensor([0.0, 1.0, 999.0])
    dim = 256
    got = frequency_embedding(t, dim)
    for row, value in zip(got, t.tolist(), strict=True):
        angles = [value * math.exp(-math.log(10000) * i / 128) for i in range(128)]
        expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        torch.testing.assert_close(row, expected, rtol=0, atol=2e-4)  # float32 angles up to 999


@pytest.mark.parametrize(("call", "message"), [
    (lambda: sincos_position_embedding(2, 2, 6), "multiple of 4"),
    (lambda: frequency_embedding(torch.zeros(1), 5), "even number"),
])  # fmt: skip
def test_dimensions_that_do_not_split_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

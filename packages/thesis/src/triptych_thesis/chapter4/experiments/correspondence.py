"""Correspondence and edits: points of one digit found in another, and a disc drawn on the average, carried to digits."""

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.images import from_uint8
from triptych_common.storage.files import write_bytes
from triptych_gangealing.correspondence import between, matches_figure, middle_points
from triptych_gangealing.edit import propagate
from triptych_gangealing.keypoints.synthetic import posed_digits
from triptych_gangealing.warp import centres, to_pixels

from triptych_thesis.chapter4.context import ONE, Context
from triptych_thesis.chapter4.pictures import COLUMNS, save_grid
from triptych_thesis.chapter4.sizes import DIGIT
from triptych_thesis.study.experiment import Experiment, Result, Section, Study

SPACING = 6  # points a side of the grid that is carried over


def measure(context: Context) -> Result:
    """Draw both pictures, on held-out digits; the result is how many were edited."""
    posed = posed_digits(context.size.shown, context.study.seed + 2, DIGIT)
    images = from_uint8(posed.images)
    warp = context.aligner(ONE).align(images, iterations=context.size.iterations).warp
    edited = propagate(disc(images.shape[-1]), warp, images)
    save_grid(context.study.folder, "edit", torch.cat([images[:COLUMNS], edited[:COLUMNS]]))

    source, target = warp.select([0]), warp.select([1])
    size = (images.shape[2], images.shape[3])
    points = to_pixels(source.map_points(middle_points(SPACING)).points, size)
    transferred = between(source, target, points, size, size)
    reliable = transferred.reliable[0]
    matches = matches_figure(
        posed.images[0], posed.images[1], points[0, reliable], transferred.points[0, reliable], ("one digit", "another")
    )
    write_bytes(context.study.folder / "figures" / "matches.png", matches)
    return {"edited": COLUMNS}


def disc(size: int) -> Float[Tensor, "4 {size} {size}"]:
    """A small yellow disc with a red rim, to be drawn on the average: RGB in [-1, 1], alpha in 0..1."""
    points = centres((size, size), torch.zeros(()))
    distance = (points - torch.tensor([0.0, -0.35])).norm(dim=-1)
    yellow, red = torch.tensor([1.0, 0.9, -1.0])[:, None, None], torch.tensor([1.0, -1, -1])[:, None, None]
    return torch.cat([torch.where((distance < 0.12)[None], yellow, red), (distance < 0.2).float()[None]])


def section(study: Study, result: Result) -> Section:
    matches = study.figure("matches", "Points of one digit found in another, by way of the aligned picture.")
    edit = study.figure("edit", "A disc drawn once, on the average, carried to real digits.", pixels=True)
    return Section("Correspondence and edits", [matches, edit])


EXPERIMENT = Experiment("correspondence", 2, measure, section, needs=lambda context: [context.training(ONE)])

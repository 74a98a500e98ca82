"""Figure 4.3: clusters of all digits, found without a label, beside k-means on pixels brought upright."""

import torch
from triptych_common.images import from_uint8
from triptych_gangealing.aligner import Aligner
from triptych_gangealing.keypoints.synthetic import posed_digits

from triptych_thesis.chapter4.cluster_scores import CLUSTERS, K_MEANS, compare_clusters
from triptych_thesis.chapter4.context import CLUSTERED, Context
from triptych_thesis.chapter4.pictures import COLUMNS, as_grey, inked, save_grid
from triptych_thesis.study.estimates import apart, interval
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, Evidence, Verdict


def measure(context: Context) -> Result:
    """Scores of the clusters of held-out digits, and a picture of them."""
    aligner = context.aligner(CLUSTERED)
    scores = compare_clusters(aligner, context.size.cluster_images, context.study.seed)
    _draw(context, aligner)
    return scores


def _draw(context: Context, aligner: Aligner) -> None:
    """A row a cluster: its average ink, then its first members, aligned."""
    images = from_uint8(posed_digits(context.size.shown, context.study.seed + 3, None).images)
    found = aligner.align(images)
    grid = torch.zeros(aligner.config.heads, COLUMNS, *images.shape[1:])
    grid[:, 0] = -1.0  # black, the average of a cluster without members
    for cluster, row in enumerate(grid):  # a view: what is written into it is in the grid
        members = (found.cluster == cluster).nonzero().flatten()
        if len(members):
            row[0] = as_grey(inked(images[members], found.warp.select(members)).mean(0))
            first = members[: COLUMNS - 1]
            row[1 : 1 + len(first)] = found.warp.select(first).sample(images[first])
    save_grid(context.study.folder, "clusters", grid.flatten(0, 1))


def verdicts(result: Result) -> list[Verdict]:
    """The aim: purer than k-means on pixels."""
    ours, baseline = result[CLUSTERS]["purity"], result[K_MEANS]["purity"]
    what = f"purity of {result['clusters']} clusters of all digits, by k-means on a contrastive descriptor"
    evidence = Evidence(what, interval(ours), beside=f"k-means on moments-aligned pixels: {interval(baseline)}")
    reached = ours["value"] > baseline["value"]
    overlap = "" if apart(ours, baseline) or apart(baseline, ours) else "purity: the intervals overlap"
    return [Verdict("gangealing.fig-4.3", CONFIRMED if reached else REFUTED, [evidence], overlap, aims=2)]


def section(study: Study, result: Result) -> Section:
    rows = [
        [name, interval(scores["purity"]), interval(scores["nmi"]), f"{scores['largest']:.2f}"]
        for name, scores in result.items() if isinstance(scores, dict)
    ]  # fmt: skip
    caption = f"{result['clusters']} clusters of held-out coloured digits, against the true digits."
    drawn = "A row a cluster: its average ink, then members, aligned. Nothing selected."
    return Section(
        "Clusters",
        [study.figure("clusters", drawn, pixels=True)],
        [Table(["method", "purity", "normalised mutual information", "largest cluster"], rows, caption)],
        "Clusters were found in generated images, without a label, by k-means on the features of a contrastive descriptor, "
        "whose views are turned, scaled and moved as far as these digits are: alignment has no part in them. Intervals are of "
        "95% and resample digits.",
    )


EXPERIMENT = Experiment("clusters", 3, measure, section, verdicts, needs=lambda context: [context.training(CLUSTERED)])

"""The command `triptych`."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from triptych_common.cli import Command, main

CHAPTERS = {
    "ch2": Command(
        "DiT: digits, block designs, scaling, guidance",
        "triptych_thesis.chapter2.study:Chapter2",
        "triptych_thesis.study.runner:run",
    ),
    "ch3": Command(
        "G.pt: a zoo of checkpoints, prompting, the memorisation audit",
        "triptych_thesis.chapter3.study:Chapter3",
        "triptych_thesis.study.runner:run",
    ),
    "ch4": Command(
        "GANgealing: alignment, correspondence, clusters",
        "triptych_thesis.chapter4.study:Chapter4",
        "triptych_thesis.chapter4.study:reproduce",
    ),
}
COMMANDS = {
    "reproduce": replace(
        CHAPTERS["ch2"],
        summary="ch2, ch3 or ch4: a chapter of the thesis from nothing to a report; triptych reproduce --help",
    ),
    "claims": Command(
        "write verdicts from results into the ledger of the thesis's claims, and render its page",
        "triptych_thesis.study.claims:ClaimsConfig",
        "triptych_thesis.study.claims:claims",
        writes="nothing",
    ),
    "figures": Command(
        "chapter 3's figures for one trained G.pt",
        "triptych_thesis.chapter3.figures:FiguresConfig",
        "triptych_thesis.chapter3.figures:figures",
    ),
    "score-alignment": Command(
        "PCK, pose errors and sharpness of an aligner on digits, beside baselines",
        "triptych_thesis.chapter4.options:AlignmentScoreConfig",
        "triptych_thesis.chapter4.alignment_scores:score_alignment",
    ),
    "score-clusters": Command(
        "score an aligner's clusters of digits against the true ones, beside k-means",
        "triptych_thesis.chapter4.options:ClustersConfig",
        "triptych_thesis.chapter4.cluster_scores:score_clusters",
    ),
}


def run(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["reproduce"]:
        return main("triptych reproduce", CHAPTERS, argv[1:])
    return main("triptych", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(run())

"""The command `triptych`."""

import sys
from collections.abc import Sequence

from triptych_common.cli import Command, deferred, main


def _chapter2() -> Command:
    from triptych_thesis.chapter2.study import Chapter2
    from triptych_thesis.study.runner import run

    return Command(Chapter2, run, {})


def _chapter3() -> Command:
    from triptych_thesis.chapter3.study import Chapter3
    from triptych_thesis.study.runner import run

    return Command(Chapter3, run, {})


def _chapter4() -> Command:
    from triptych_thesis.chapter4.study import Chapter4, reproduce

    return Command(Chapter4, reproduce, {})


def _claims() -> Command:
    from triptych_thesis.study.claims import ClaimsConfig, claims

    return Command(ClaimsConfig, claims, {})


def _figures() -> Command:
    from triptych_thesis.chapter3.figures import FiguresConfig, figures

    return Command(FiguresConfig, figures, {})


def _score_clusters() -> Command:
    from triptych_thesis.chapter4.options import ClustersConfig

    return Command(ClustersConfig, deferred("triptych_thesis.chapter4.cluster_scores:score_clusters"), {})


def _score_alignment() -> Command:
    from triptych_thesis.chapter4.options import AlignmentScoreConfig

    return Command(AlignmentScoreConfig, deferred("triptych_thesis.chapter4.alignment_scores:score_alignment"), {})


CHAPTERS = {
    "ch2": ("DiT: digits, block designs, scaling, guidance", _chapter2),
    "ch3": ("G.pt: a zoo of checkpoints, prompting, the memorisation audit", _chapter3),
    "ch4": ("GANgealing: alignment, correspondence, clusters", _chapter4),
}
COMMANDS = {
    "reproduce": (
        "ch2, ch3 or ch4: a chapter of the thesis from nothing to a report; triptych reproduce --help",
        _chapter2,
    ),
    "claims": ("write verdicts from results into the ledger of the thesis's claims, and render its page", _claims),
    "figures": ("chapter 3's figures for one trained G.pt", _figures),
    "score-alignment": ("PCK, pose errors and sharpness of an aligner on digits, beside baselines", _score_alignment),
    "score-clusters": ("score an aligner's clusters of digits against the true ones, beside k-means", _score_clusters),
}


def run(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["reproduce"]:
        return main("triptych reproduce", CHAPTERS, argv[1:])
    return main("triptych", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(run())

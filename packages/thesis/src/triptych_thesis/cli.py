"""The command `triptych`."""

if __name__ == "__main__":  # before anything that takes time to import
    from triptych_common.interrupts import install

    install()

import sys
from collections.abc import Sequence
from dataclasses import replace

from triptych_common.cli import Command, leave, main

THESIS, RUN = "triptych_thesis", "triptych_thesis.study.runner:run"
SUBJECTS = {
    2: "DiT: digits, block designs, scaling, guidance",
    3: "G.pt: a zoo of checkpoints, prompting, the memorisation audit",
    4: "GANgealing: alignment, correspondence, clusters",
}
# A study checks itself what it writes over: its folder holds runs of several sizes, each of its own settings.
CHAPTERS = {
    f"ch{n}": Command(what, f"{THESIS}.chapter{n}.study:Chapter{n}", RUN, writes="nothing")
    for n, what in SUBJECTS.items()
}
CHAPTERS["ch4"] = replace(CHAPTERS["ch4"], run=f"{THESIS}.chapter4.study:reproduce")
COMMANDS = {
    "reproduce": replace(
        CHAPTERS["ch2"],
        summary="ch2, ch3 or ch4: a chapter of the thesis from nothing to a report; triptych reproduce --help",
    ),
    "claims": Command(
        "write verdicts from results into the ledger of the thesis's claims, and render its page",
        f"{THESIS}.study.claims:ClaimsConfig", f"{THESIS}.study.claims:claims", writes="nothing",
    ),
    "figures": Command(
        "chapter 3's figures for one trained G.pt",
        f"{THESIS}.chapter3.figures:FiguresConfig", f"{THESIS}.chapter3.figures:figures",
    ),
    "score-alignment": Command(
        "PCK, pose errors and sharpness of an aligner on digits, beside baselines",
        f"{THESIS}.chapter4.options:AlignmentScoreConfig", f"{THESIS}.chapter4.alignment_scores:score_alignment",
    ),
    "score-clusters": Command(
        "score an aligner's clusters of digits against the true ones, beside k-means",
        f"{THESIS}.chapter4.options:ClustersConfig", f"{THESIS}.chapter4.cluster_scores:score_clusters",
    ),
}  # fmt: skip


def run(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["reproduce"]:
        return main("triptych reproduce", CHAPTERS, argv[1:])
    return main("triptych", COMMANDS, argv)


if __name__ == "__main__":
    leave(run())

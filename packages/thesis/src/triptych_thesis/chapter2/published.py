"""What the reports of chapter 2 share: the thesis's numbers, and the table of a gallery's scores."""

from typing import Any

from triptych_common.metrics import Estimate

from triptych_thesis.study.old_report import Report

THESIS = {  # Table 2.2, ImageNet 256x256, FID-50K: (unguided XL/2, guided XL/2-G at 1.50)
    "frechet": ("9.62", "2.27"),
    "precision": ("0.67", "0.83"),
    "recall": ("0.67", "0.57"),
}


def scores_table(report: Report, scores: dict[str, Any]) -> None:
    """Samples beside real digits and the trivial baseline."""
    names = {
        "guided": "samples, guided", "unguided": "samples, unguided", "training digits": "training digits (what copying scores)",
        "class means": "mean digit of each class (trivial baseline)",
    }  # fmt: skip
    columns = ("frechet", "kernel", "precision", "recall", "accuracy", "near_duplicates")
    report.table(
        ("", "Fréchet distance", "KID", "precision", "recall", "class accuracy", "near-duplicates"),
        [(title, *(str(Estimate(**scores["rows"][key][c])) for c in columns)) for key, title in names.items()],
        f"Against {scores['n']:,} held-out digits with as many samples; 95% bootstrap intervals. Distances, precision and "
        f"recall (k=3) in 64 features of the frozen network mnist_features "
        f"({scores['instruments']['mnist_features'][:12]}), accuracy by mnist_classifier "
        f"({scores['instruments']['mnist_classifier'][:12]}). Real-real floor of the Fréchet distance: "
        + ", ".join(f"{value:.2f}" for value in scores["floor"]["sets"])
        + f" for disjoint sets of {scores['n']:,} training digits. Near-duplicates: nearer in pixels to a training digit "
        "than 95% of held-out digits are.",
    )

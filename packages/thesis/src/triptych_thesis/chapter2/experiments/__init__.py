"""The experiments of chapter 2, one module each; `triptych_thesis.study.experiment.discover` finds them."""

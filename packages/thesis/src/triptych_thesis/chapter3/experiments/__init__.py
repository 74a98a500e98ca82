"""The experiments of chapter 3, one a module; `triptych_thesis.study.experiment.discover` finds them."""

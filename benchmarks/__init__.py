"""The shared benchmark runner and its suites. Not a distribution: run `make bench` from the repository's root."""

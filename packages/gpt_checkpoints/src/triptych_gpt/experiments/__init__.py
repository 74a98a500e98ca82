"""The experiments of chapter 3, each a function of data and of an update to try."""

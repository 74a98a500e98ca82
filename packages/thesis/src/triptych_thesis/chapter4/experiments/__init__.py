"""The experiments of chapter 4, one a module."""

"""Chapter 4: visual alignment learned from a generator."""

"""Chapter 2 as a study: named experiments over models that they share, what they found, and a report."""

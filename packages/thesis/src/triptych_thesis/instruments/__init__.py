"""How the frozen instruments that score digits were trained."""

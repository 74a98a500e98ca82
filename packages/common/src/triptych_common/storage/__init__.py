"""Files: written atomically, checked when read; checkpoints, others' files, and the run directory."""

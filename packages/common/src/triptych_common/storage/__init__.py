"""Files, written atomically and checked when read: checkpoints, model files, other programs' files, run directories."""

"""Slurm: its text (`format`), its commands (`queue`), submitting (`submit`), folds over several nodes (`backend`)."""

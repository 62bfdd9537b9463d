"""Launching, supervising and merging the folds of a run. Imports no torch."""

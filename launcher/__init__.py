"""launcher: what happens around the folds of one run. Imports no torch."""

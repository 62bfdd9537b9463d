"""Training of one fold, from its data to its out-of-fold predictions, in one process or several."""

"""Out-of-fold predictions: one fold's part, the merge of all, and the figures over them. Imports no torch."""

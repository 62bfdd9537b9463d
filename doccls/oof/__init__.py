"""Out-of-fold (OOF) predictions: those of one fold, the merged files, and metrics over them. Imports no torch."""

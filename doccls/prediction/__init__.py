"""Predictions of new pages by the models of a run's folds."""

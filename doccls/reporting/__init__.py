"""The output of a command while it runs and when it ends: log, progress bars, console, W&B."""

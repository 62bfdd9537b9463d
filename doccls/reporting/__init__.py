"""What a command reports while it runs and as it ends: log, progress bars, console, W&B."""

"""Slurm: its text formats (`format`), commands (`queue`), submissions (`submit`) and job steps (`steps`)."""

"""The HTML report of a finished run: one file, with everything in it."""

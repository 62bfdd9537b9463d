"""What a run leaves behind: its paths, its files, its log, its record."""

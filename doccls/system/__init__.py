"""Operating-system services for one process: signals, atomic files, locks, ranks, cores, memory, disk."""

"""What a process needs from its machine: signals, files that are whole, locks, ranks, cores, memory, disk."""

"""One fold from its data to its OOF part, on one process or many."""

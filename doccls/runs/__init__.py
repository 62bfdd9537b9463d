"""The list of the runs in an experiments folder."""

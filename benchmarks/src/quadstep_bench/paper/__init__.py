"""The paper: the runs of its figures, and the claims of its section 4."""

"""Training runs: what determines one, what it records, and running many at a time."""

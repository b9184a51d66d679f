"""The laboratory: data, models, runs and their records; figures and claims drawn from these."""

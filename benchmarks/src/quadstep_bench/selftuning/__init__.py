"""Self-tuning: one frozen setting on all tasks, held-out results first.

The rules are those of AlgoPerf's self-tuning track, at the scale of one machine. A target on the
validation set of each task is set by a tuned baseline; entrants run without any tuning.
"""

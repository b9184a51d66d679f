"""Self-tuning: one frozen setting on all tasks, held-out results first.

The rules follow AlgoPerf's self-tuning track, at the scale of one machine: a target on the
validation set of each task is set by a tuned baseline, and entrants run without any tuning.
"""

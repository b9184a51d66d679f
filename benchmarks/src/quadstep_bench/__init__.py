"""Experiments with quadstep: tasks, optimizers, runs, and the reports written from them."""

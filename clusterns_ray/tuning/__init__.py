"""Sweeps: Optuna proposes, Ray Tune runs, and the Optuna study on disk is the truth."""

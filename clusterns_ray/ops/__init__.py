"""Checks and plans before a run costs anything: doctor, plan, and the lint of cluster files."""

"""One run: the loop, its objective, its optimiser, its checkpoints. Knows nothing of Ray."""

"""From plain text to batches: reading sentences, storing their tokens, and the order of an epoch."""

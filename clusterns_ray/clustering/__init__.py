"""K-means over the embeddings while training: the pure steps, their state, and the start gate."""

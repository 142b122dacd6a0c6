"""`clusterns plan`: what a run needs on each number of workers, and how long it takes, by a model of its step."""

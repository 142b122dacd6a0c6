"""`clusterns plan`: what a run needs on so many workers, and how long it takes there, by a model of its step."""

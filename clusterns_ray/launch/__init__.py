"""From a configuration to a finished run: checks, data, workers."""

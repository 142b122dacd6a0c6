"""Files that are written whole or not at all, object stores, leases, and paths that users give."""

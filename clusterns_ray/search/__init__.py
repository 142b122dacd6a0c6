"""Semantic search: ``SemanticIndex``."""

"""`clusterns doctor`: what would go wrong, found before anything slow or costly starts."""

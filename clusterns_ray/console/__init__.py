"""What a terminal shows: one renderer for each kind of event or result."""

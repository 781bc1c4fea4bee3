"""The loop, what a rank trains, and how that becomes files."""

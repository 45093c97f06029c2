"""What is on disk, and what it amounts to. Knows no task, no model and no report."""

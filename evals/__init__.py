"""The harness: tasks, generation with measurements, run records and tables."""

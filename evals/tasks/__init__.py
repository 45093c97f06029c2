"""Data, prompts and scores: what a task is, and one module a task."""

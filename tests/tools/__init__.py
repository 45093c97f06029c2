"""Commands for the tests' own sake: they make golden records, verify and replay them, and soak."""

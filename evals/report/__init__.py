"""Tables, figures, verdicts and one HTML page from records. Never loads a model."""

"""Serving: from a run's folder or an exported bundle to probabilities and rankings of raw values."""

"""Evaluate, explain and export a finished run."""

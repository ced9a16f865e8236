"""What is done with a finished run: evaluate, explain and export it."""

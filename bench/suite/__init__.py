"""What is timed: cases, the providers that compete on them, their inputs and expected results."""

"""What is timed: cases, the providers that compete on them, inputs and expected results."""

"""Images, their splits and their batches."""

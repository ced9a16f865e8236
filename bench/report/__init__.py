"""Tables, pictures and targets from result files."""

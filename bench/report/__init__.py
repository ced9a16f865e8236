"""What the result files say: tables, pictures, and how far the targets are."""

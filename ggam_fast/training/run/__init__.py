"""One training run: `ggam-fast train`."""

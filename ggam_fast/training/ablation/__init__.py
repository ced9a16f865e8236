"""Many training runs, compared: `ggam-fast ablate`."""

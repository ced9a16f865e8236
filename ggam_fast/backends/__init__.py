"""What the closed form runs on: torch operations or Triton kernels, found by name in `registry`."""

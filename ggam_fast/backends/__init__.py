"""The backends of the closed form: torch operations or Triton kernels.  `registry` finds them by name."""

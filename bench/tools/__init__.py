"""Commands, one in each file.  `python -m bench.NAME` answers one question about kernels or a step."""

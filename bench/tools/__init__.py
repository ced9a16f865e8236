"""One command a file: `python -m bench.NAME` answers one question about the kernels or a step."""

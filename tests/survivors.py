"""Mutants that no test can notice, and why: for each file, the lines before and after the change.

`python -m tests.mutants` does not run these.  A row that is no mutant any more fails tests/test_mutants.py.
"""

SURVIVORS: dict[str, dict[tuple[str, str], str]] = {}

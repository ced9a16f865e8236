"""`python -m ggam_fast.training.cli` does the same as `ggam-fast`. torchrun needs this form."""

import sys

from ggam_fast.training.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m ggam_fast.training.cli`, which torchrun starts; the same as `ggam-fast`."""

import sys

from ggam_fast.training.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

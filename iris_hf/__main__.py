"""`python -m iris_hf`, `accelerate launch -m iris_hf`."""

import sys

from iris_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())

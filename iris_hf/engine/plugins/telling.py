"""Lines for people, whether or not they have set up logging."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm


def tell(logger: logging.Logger, line: str) -> None:
    """Log a line at level INFO, or write it to stderr, above the bars, where nobody listens to that."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    else:
        tqdm.write(line, file=sys.stderr)

"""Keep a training framework's advice out of our output."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence what Lightning says that is not about the run."""
    # Lightning advertises, suggests worker processes for data that are in memory, and trips over a
    # deprecation of its own dependencies; none of it is about the run.
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        # Batches are drawn from the step's own seed, so where an epoch ends means nothing.
        warnings.filterwarnings("ignore", message=".*ended before the epoch ended.*")
        try:
            yield
        finally:
            logger.setLevel(level)

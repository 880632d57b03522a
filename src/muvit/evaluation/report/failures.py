"""Parts of a report that may fail without the rest."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LOG = logging.getLogger(__name__)


@contextmanager
def warn_if_it_fails(what: str) -> Iterator[None]:
    """Turn an error into one warning: a page without this part is better than none."""
    try:
        yield
    except Exception as error:
        _LOG.warning("%s could not be drawn and is left out: %s", what, error)

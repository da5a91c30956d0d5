"""When Python looks for garbage: not while objects are made by the hundred thousand, none of them in circles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_looked_for() -> Iterator[None]:
    """Inside, objects in circles are not looked for; afterwards they are again, if they were before.

    The collector walks over all objects that live again and again while they become more: a fifth, and at times half,
    of what listing 20,000 matrices takes. What no circle holds is freed at once, as ever.

    Example:
        >>> with not_looked_for():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()

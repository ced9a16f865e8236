"""The providers of a case side by side: all built, then all checked, then timed together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from .timing import Measured

T = TypeVar("T")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A provider whose results were right, and how long it takes."""

    peer: T
    parity: float
    measured: Measured


def timed(
    providers: Sequence[str],
    build: Callable[[str], T],
    check: Callable[[str, T], float],
    measure: Callable[[dict[str, T]], Mapping[str, Measured]],
) -> dict[str, Timed[T] | Exception]:
    """Each provider as timed with the others, or why it was not."""
    found: dict[str, Timed[T] | Exception] = {}
    built: dict[str, T] = {}
    shares: dict[str, float] = {}
    # Building one makes the compiler forget the others: all are built before one is called.
    for name in providers:
        with _failure_in(found, name):
            built[name] = build(name)
    for name, peer in built.items():
        with _failure_in(found, name):
            shares[name] = check(name, peer)
    measured = measure({name: built[name] for name in shares})
    return found | {name: Timed(built[name], share, measured[name]) for name, share in shares.items()}


def take(found: dict[str, Timed[T] | Exception], provider: str) -> Timed[T]:
    """The provider's own, which `found` no longer keeps alive; raises why it was not timed."""
    own = found.pop(provider)
    if isinstance(own, Exception):
        raise own
    return own


@contextmanager
def _failure_in(found: dict[str, Timed[T] | Exception], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found[name] = error

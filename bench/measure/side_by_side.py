"""Build all providers of a case, check them, then time them together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from bench.measure.timing import Measured

T = TypeVar("T")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A provider with correct results, and how long it takes."""

    peer: T
    parity: float
    measured: Measured


def timed(
    providers: Sequence[str],
    build: Callable[[str], T],
    check: Callable[[str, T], float],
    measure: Callable[[dict[str, T]], Mapping[str, Measured]],
) -> dict[str, Timed[T] | Exception]:
    """Each provider's times, or the error that prevented them."""
    found: dict[str, Timed[T] | Exception] = {}
    built: dict[str, T] = {}
    shares: dict[str, float] = {}
    # Building a provider resets the compiler, so build all before the first call.
    for name in providers:
        with _failure_in(found, name):
            built[name] = build(name)
    for name, peer in built.items():
        with _failure_in(found, name):
            shares[name] = check(name, peer)
    measured = measure({name: built[name] for name in shares})
    return found | {name: Timed(built[name], share, measured[name]) for name, share in shares.items()}


def take(found: dict[str, Timed[T] | Exception], provider: str) -> Timed[T]:
    """Remove a provider from `found` and return its times, or raise the error that prevented them."""
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

"""One line that says whether a number meets its target."""


def verdict(name: str, value: float, limit: float, *, at_least: bool = False, digits: int = 2) -> str:
    """ "met" or "MISSED", the name, the value and its limit."""
    met = value >= limit if at_least else value <= limit
    bound = "at least" if at_least else "at most"
    return f"{'met   ' if met else 'MISSED'} {name}: {value:.{digits}f} ({bound} {limit:g})"

"""Two files about the same texts, row by row: answers and what they are compared with, in whatever order each has."""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from alpaca.common.errors import UsageError
from alpaca.data import Row, load_rows


def load_named(path: str, flag: str, load: Callable[[str], list[Row]] = load_rows) -> list[Row]:
    """`load` of a file that another flag than --data_path has named."""
    try:
        return load(path)
    except UsageError as error:
        raise UsageError(str(error).replace("--data_path", flag, 1)) from error


def partners(wanted: Sequence[str], offered: Sequence[str], told: str) -> list[int]:
    """For each text of `wanted` the place of the same text in `offered`; for its second time there, the second place.

    told: the message's begin if a text has no partner.

    Raises:
        UsageError: the rows that have none.
    """
    places: dict[str, deque[int]] = defaultdict(deque)
    for place, text in enumerate(offered):
        places[text].append(place)
    found = [places[text].popleft() if places[text] else None for text in wanted]
    if missing := [row for row, place in enumerate(found) if place is None]:
        raise UsageError(f"{told} for {len(missing)} of {len(wanted)} rows (rows {missing[:10]})")
    return found

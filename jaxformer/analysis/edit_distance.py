"""How many insertions, deletions and substitutions lead from one sequence to another."""

from collections.abc import Hashable, Sequence


def levenshtein(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Counts the fewest single insertions, deletions and substitutions that make them equal.

    What both begin and end with is set aside first. The columns of the table of distances are
    then bits of Python's integers, so that a step costs as much as an addition.

    References:
        Hyyrö 2003, "A bit-vector algorithm for computing Levenshtein and Damerau edit distances",
        Nordic Journal of Computing 10, figure 3.
    """
    start = 0
    while start < min(len(left), len(right)) and left[start] == right[start]:
        start += 1
    end = 0
    while end < min(len(left), len(right)) - start and left[-1 - end] == right[-1 - end]:
        end += 1
    left, right = left[start : len(left) - end], right[start : len(right) - end]
    if not left or not right:
        return max(len(left), len(right))
    return _bitwise(left, right)


def _bitwise(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Bit i of the vectors says how the distance changes from row i to row i + 1 of `left`."""
    places: dict[Hashable, int] = {}
    for i, item in enumerate(left):
        places[item] = places.get(item, 0) | 1 << i
    every, last = (1 << len(left)) - 1, 1 << len(left) - 1
    up, down, distance = every, 0, len(left)
    for item in right:
        equal = places.get(item, 0)
        diagonal = ((((equal & up) + up) ^ up) | equal | down) & every
        grows, shrinks = (down | ~(diagonal | up)) & every, up & diagonal
        distance += bool(grows & last) - bool(shrinks & last)
        grows, shrinks = (grows << 1 | 1) & every, shrinks << 1 & every
        up, down = (shrinks | ~(diagonal | grows)) & every, grows & diagonal
    return distance

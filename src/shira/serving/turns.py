"""Whose turn it is: one selection at a time is in the weights, and each gets some steps of the engine.

A turn is a number of steps for which one selection is served. When it is over, the selection that has waited longest is next.
So a selection that wants steps waits at most `patience` seconds, plus one step and one switch for each selection that was ahead
of it: the turn of every selection ahead is made short enough, down to a single step. All others are ahead of the selection that
had the last step.

If more selections want steps than can be held ready, each turn begins with reading a file. Then turns are not made short: with
single steps nearly all the time would go into reading, and all would wait longer.

There is no clock and no engine in here, so a simulation can use the same code (tests/test_turns.py).
"""

from collections.abc import Iterable, Mapping
from math import inf

from ..errors import ShiraError

__all__ = ["Turns"]

REMEMBERED = 64  # selections that want nothing now, of which it is known when they were served


class Turns:
    """Chooses the selection of the next step.

    quantum: steps of a turn while others wait. A selection with more requests than the average gets more, in proportion.
    patience: seconds that a selection waits at most, beyond one step and one switch for each selection ahead of it. It does not
    hold while more than `ready` selections want steps: then each of those ahead has its whole turn.
    switches: how often the chosen selection was another than before. longest_wait: seconds that one has waited for its turn.

        turns = Turns(quantum=16, patience=6.0)
        key = turns.choose({"": 0.0, '[["poet","1f",1.0]]': 0.4}, now=0.5)
    """

    def __init__(self, *, quantum: int = 16, patience: float = 6.0, ready: float = inf) -> None:
        if quantum < 1 or not 0 <= patience < inf:
            raise ShiraError(
                f"quantum must be a whole number from 1 on, found {quantum}; and patience seconds from 0 on, found {patience}"
            )
        self.quantum, self.patience, self.ready = quantum, patience, ready
        self.switches, self.longest_wait = 0, 0.0
        self._turn: str | None = None
        self._steps, self._most = 0, 0  # of this turn: done, and allowed while others wait
        self._end = 0.0  # when this turn must end because others wait
        self._served: dict[str, float] = {}  # selection -> when its last step was chosen
        self._waiting: list[str] = []  # those that wait, in their order
        self._seen: set[str] = set()  # those that have been considered for the end of this turn

    def choose(self, present: Mapping[str, float], now: float, sizes: Mapping[str, int] | None = None) -> str:
        """The key of the selection to serve in the next step.

        present: key -> when the oldest of its requests came, for each selection that wants a step; in seconds, as `now`.
        sizes: key -> number of its requests; 1 each if it is not given.
        Raises ValueError if nothing wants a step.
        """
        if not present:
            raise ValueError("no selection wants a step")
        sizes = sizes or dict.fromkeys(present, 1)
        if len(self._served) > 2 * len(present) + REMEMBERED:
            self._served = {key: when for key, when in self._served.items() if key in present}
        if self._turn not in present or (len(present) > 1 and self._is_over(present, now, sizes)):
            self._begin(present, now, sizes)
        assert self._turn is not None
        self._steps += 1
        self._served[self._turn] = now
        return self._turn

    def upcoming(self) -> tuple[str, ...]:
        """The selections that wait for their turn, the next one first."""
        return tuple(key for key in self._waiting if key != self._turn)

    def since(self, key: str, arrived: float) -> float:
        """Since when a selection waits for a step. arrived: when the oldest of its requests came."""
        return max(self._served.get(key, arrived), arrived)

    def served_in(self, group: str, keys: Iterable[str], now: float) -> None:
        """The step that was chosen for a group was that of these selections. A group itself has no waiting time."""
        self._served.pop(group, None)
        self._served.update(dict.fromkeys(keys, now))

    def _since(self, key: str, present: Mapping[str, float]) -> float:
        return self.since(key, present[key])

    def _is_over(self, present: Mapping[str, float], now: float, sizes: Mapping[str, int]) -> bool:
        if self._seen != present.keys():
            new = sorted(present.keys() - self._seen, key=present.__getitem__)
            self._waiting = [key for key in self._waiting if key in present] + new
            self._most = self._share(present, sizes)
            self._end = min(self._end, self._deadline(new, present, now, sizes))
            self._seen = set(present)
        return self._steps >= self._most or now >= self._end

    def _begin(self, present: Mapping[str, float], now: float, sizes: Mapping[str, int]) -> None:
        order = sorted(present, key=lambda key: (key == self._turn, self._since(key, present)))
        self.longest_wait = max(self.longest_wait, now - self._since(order[0], present))
        self.switches += order[0] != self._turn and self._turn is not None
        self._turn, self._waiting = order[0], order[1:]
        self._steps, self._most = 0, self._share(present, sizes)
        self._end = self._deadline(self._waiting, present, now, sizes)
        self._seen = set(present)

    def _share(self, present: Mapping[str, float], sizes: Mapping[str, int]) -> int:
        """Steps of this turn: the quantum, more for a selection with more requests than the others."""
        assert self._turn is not None
        mean = sum(sizes[key] for key in present) / len(present)
        return round(self.quantum * max(1.0, sizes[self._turn] / mean))

    def _deadline(self, waiting: list[str], present: Mapping[str, float], now: float, sizes: Mapping[str, int]) -> float:
        """When this turn must end, so that each of `waiting` is served in time.

        The time that a selection can still wait is shared by all turns before its own, in proportion to their requests.
        """
        assert self._turn is not None
        if len(present) > self.ready:
            return inf
        own = ahead = sizes[self._turn]
        end = inf
        wanted = set(waiting)
        for key in self._waiting:
            if key in wanted:
                end = min(end, now + (self._since(key, present) + self.patience - now) * own / ahead)
            ahead += sizes[key]
        return end

"""What is kept as long as there is room: the least recently used goes first."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values under their keys, of `limit` bytes in all. Used by one thread."""

    def __init__(self, limit: int, bytes_of: Callable[[Value], int]):
        self.limit, self._bytes_of = limit, bytes_of
        self.bytes = self.evicted = 0
        self._values: OrderedDict[str, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Value | None:
        """The value, which is now the most recently used; None where there is none."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: str, value: Value) -> bool:
        """Keeps a value and lets others go; returns False where it alone is too large, and is not kept."""
        self.remove(key)
        if self._bytes_of(value) > self.limit:
            return False
        self._values[key] = value
        self.bytes += self._bytes_of(value)
        while self.bytes > self.limit:
            self.remove(next(iter(self._values)))
            self.evicted += 1
        return True

    def remove(self, key: str) -> bool:
        """Returns whether there was such a value."""
        value = self._values.pop(key, None)
        if value is not None:
            self.bytes -= self._bytes_of(value)
        return value is not None

    def items(self) -> list[tuple[str, Value]]:
        """The most recently used first."""
        return list(reversed(self._values.items()))

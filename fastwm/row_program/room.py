"""Room in a row of scratch, shared out to the values that are alive at a time."""

from __future__ import annotations

__all__ = ["Room"]


class Room:
    """Intervals of elements per row, given out by first fit and taken back.

    Example:
        >>> from fastwm.row_program.room import Room
        >>> room = Room()
        >>> room.take(8), room.take(4), room.give(0, 8), room.take(4), room.size
        (0, 8, None, 0, 12)
    """

    def __init__(self) -> None:
        self.size = 0
        self.free: list[tuple[int, int]] = []  # (offset, length), by offset

    def take(self, length: int) -> int:
        for position, (offset, room) in enumerate(self.free):
            if room >= length:
                self.free[position : position + 1] = (
                    [(offset + length, room - length)] if room > length else []
                )
                return offset
        if self.free and sum(self.free[-1]) == self.size:
            offset, _ = self.free.pop()
        else:
            offset = self.size
        self.size = offset + length
        return offset

    def give(self, offset: int, length: int) -> None:
        self.free = sorted([*self.free, (offset, length)])
        merged: list[tuple[int, int]] = []
        for start, room in self.free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self.free = merged

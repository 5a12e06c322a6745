"""A model of PyTorch's CUDA caching allocator, and the replay of a trace of allocations through it.

It follows c10/cuda/CUDACachingAllocator.cpp (native backend, one stream): sizes rounded to 512 B; requests of at most
1 MiB from 2 MiB segments; below 10 MiB from 20 MiB segments; above that from segments rounded to 2 MiB; best fit,
splitting, merging, and a flush of unused segments before it gives up.
"""

import contextlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MIB = 1 << 20
ROUNDING = 512
SMALL = 1 * MIB  # at most this comes from the small pool
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB  # from this on a request gets a segment of its own size
SEGMENT_ROUNDING = 2 * MIB
UNLIMITED = 1 << 62

# Expandable segments give back every free page before they fail, so the need is what lives and the pages that are
# partly used: 18 and 49 MiB above it for SD 1.5 at 512x512, batch 1 and 4, on an H100 (a search under a cap).
EXPANDABLE_SLACK = 50 * MIB

Event = tuple[int, "int | tuple[int, ...] | str"]
"""(n, bytes) takes block n; (-n, 0) gives it back; (0, (bytes, …)) is an optional workspace, the first that there is
room for, taken and given back at once; (0, "empty_cache"); (0, "enter:PHASE")."""


class OutOfMemory(Exception):
    """The cap is too low for the trace."""


def rounded(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


class Block:
    """A piece of a segment: in use, or free and in its pool."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(self, address: int, size: int, small: bool, before: "Block | None", after: "Block | None") -> None:
        self.address, self.size, self.small = address, size, small
        self.before, self.after = before, after
        self.free = False


Pool = list[tuple[int, int, Block]]


class Allocator:
    """Bytes in, bytes out. `expandable` models expandable segments while nothing is capped."""

    def __init__(self, cap: int = UNLIMITED, expandable: bool = False) -> None:
        self.cap, self.expandable = cap, expandable
        self.pools: tuple[Pool, Pool] = ([], [])  # large and small, sorted by size and address
        self.tails: dict[bool, Block] = {}  # the last block of each pool's one expandable segment
        self.top = 0
        self.idle_segments = 0  # free as a whole
        self.reserved = self.allocated = self.reserved_peak = self.allocated_peak = 0

    def empty_cache(self) -> None:
        """Give back the segments that are free as a whole."""
        if self.expandable or not self.idle_segments:
            return
        self.idle_segments = 0
        for pool in self.pools:
            self.reserved -= sum(size for size, _, block in pool if not (block.before or block.after))
            pool[:] = [entry for entry in pool if entry[2].before or entry[2].after]

    def _grow(self, size: int) -> None:
        if self.reserved + size > self.cap:
            self.empty_cache()
            if self.reserved + size > self.cap:
                raise OutOfMemory(size)
        self.reserved += size
        self.reserved_peak = max(self.reserved_peak, self.reserved)

    def _segment(self, size: int, small: bool) -> Block:
        if self.expandable:
            return self._extend(size, small)
        if small:
            size = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            size = LARGE_SEGMENT
        else:
            size = rounded(size, SEGMENT_ROUNDING)
        self._grow(size)
        self.top += size + (1 << 30)  # segments are never neighbours
        return Block(self.top - size, size, small, None, None)

    def _extend(self, size: int, small: bool) -> Block:
        """Map more pages at the end of the pool's segment, beginning with what is free there."""
        tail = self.tails.get(small)
        base = (1 << 50) if small else 0
        page = SMALL_SEGMENT if small else LARGE_SEGMENT
        if tail is not None and tail.free:
            pool = self.pools[small]
            del pool[bisect_left(pool, (tail.size, tail.address))]
            more = rounded(size - tail.size, page)
            self._grow(more)
            tail.size += more
            tail.free = False
            return tail
        more = rounded(size, page)
        self._grow(more)
        block = Block(tail.address + tail.size if tail else base, more, small, tail, None)
        if tail:
            tail.after = block
        self.tails[small] = block
        return block

    def malloc(self, size: int) -> Block:
        """A block of at least `size` bytes; raises OutOfMemory under the cap."""
        size = max(ROUNDING, rounded(size, ROUNDING))
        small = size <= SMALL
        pool = self.pools[small]
        at = bisect_left(pool, (size,))
        if self.expandable and at + 1 < len(pool) and pool[at][2] is self.tails.get(small):
            at += 1  # the block that can still grow counts as the largest
        if at < len(pool):
            block = pool.pop(at)[2]
            self.idle_segments -= not (block.before or block.after)
        else:
            block = self._segment(size, small)
        rest = block.size - size
        if rest >= ROUNDING if small or self.expandable else rest > SMALL:
            other = Block(block.address + size, rest, small, block, block.after)
            other.free = True
            if block.after:
                block.after.before = other
            elif self.expandable:
                self.tails[small] = other
            block.after, block.size = other, size
            insort(pool, (rest, other.address, other))
        block.free = False
        self.allocated += block.size
        self.allocated_peak = max(self.allocated_peak, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Back to its pool, merged with free neighbours."""
        self.allocated -= block.size
        pool = self.pools[block.small]
        for other in (block.after, block.before):
            if other and other.free:
                del pool[bisect_left(pool, (other.size, other.address))]
                block, gone = (other, block) if other is block.before else (block, other)
                block.size += gone.size
                block.after = gone.after
                if gone.after:
                    gone.after.before = block
                elif self.expandable:
                    self.tails[block.small] = block
        block.free = True
        self.idle_segments += not (block.before or block.after)
        insort(pool, (block.size, block.address, block))

    def try_workspace(self, sizes: Iterable[int]) -> None:
        """Take and give back the first of these sizes that there is room for: cuDNN has an algorithm for each."""
        for size in sizes:
            with contextlib.suppress(OutOfMemory):
                self.release(self.malloc(size))
                return


@dataclass
class Replay:
    """Peaks in bytes: of the whole trace, and of allocated memory by phase."""

    allocated_peak: int = 0
    reserved_peak: int = 0
    phases: dict[str, int] = field(default_factory=dict)


def replay(events: Sequence[Event], cap: int = UNLIMITED, expandable: bool = False) -> Replay:
    """Run a trace through a fresh allocator.

    Raises:
        OutOfMemory: when the cap is too low.
    """
    allocator, blocks, result = Allocator(cap, expandable), {}, Replay()
    phase = "load"

    def leave() -> None:
        result.phases[phase] = max(result.phases.get(phase, 0), allocator.allocated_peak)
        result.allocated_peak = max(result.allocated_peak, allocator.allocated_peak)
        allocator.allocated_peak = allocator.allocated

    for number, value in events:
        if number > 0:
            blocks[number] = allocator.malloc(value)  # type: ignore[arg-type]
        elif number < 0:
            allocator.release(blocks.pop(-number))
        elif value == "empty_cache":
            allocator.empty_cache()
        elif isinstance(value, str):
            leave()
            phase = value.removeprefix("enter:")
        else:
            allocator.try_workspace(value)  # type: ignore[arg-type]
    leave()
    result.reserved_peak = allocator.reserved_peak
    return result


def smallest_cap(events: Sequence[Event], low: int, high: int, tolerance: int) -> int:
    """The smallest cap in (low, high], in bytes and within `tolerance`, under which the trace completes."""
    while high - low > tolerance:
        cap = (low + high) // 2
        try:
            replay(events, cap)
            high = cap
        except OutOfMemory:
            low = cap
    return high

"""A model of PyTorch's CUDA caching allocator, and the replay of a trace of allocations through it.

It follows c10/cuda/CUDACachingAllocator.cpp (native backend): sizes rounded to 512 B; requests of at most 1 MiB from
2 MiB segments; below 10 MiB from 20 MiB segments; above that from segments rounded to 2 MiB; best fit, splitting,
merging, and a flush of unused segments before it gives up. Each stream has pools of its own. With expandable segments
each pool is one range of addresses, in which pages are mapped where they are needed, and free ones unmapped before it
gives up.
"""

import contextlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

MIB = 1 << 20
ROUNDING = 512
SMALL = 1 * MIB  # at most this comes from the small pool
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB  # from this on a request gets a segment of its own size
SEGMENT_ROUNDING = 2 * MIB
UNLIMITED = 1 << 62

Event = tuple[int, "int | tuple[int, ...] | str"]
"""(n, bytes) takes block n; (-n, 0) gives it back; (0, (bytes, …)) is an optional workspace, the first that there is
room for, taken and given back at once; (0, "empty_cache"); (0, "enter:PHASE"); (0, "stream:N") makes stream N the one
that blocks are taken for, which is 0 at first."""


class OutOfMemory(Exception):
    """The cap is too low for the trace."""


def rounded(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


class Block:
    """A piece of a segment: in use, free and in its pool, or addresses that no page is mapped to."""

    __slots__ = ("address", "after", "before", "free", "mapped", "pool", "size")

    def __init__(self, address: int, size: int, pool: "Pool", before: "Block | None", after: "Block | None") -> None:
        self.address, self.size, self.pool = address, size, pool
        self.before, self.after = before, after
        self.free = False
        self.mapped = True


class Pool:
    """What is free for one stream's small requests, or for its large ones."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.free: list[tuple[int, int, Block]] = []  # sorted by size and address
        self.unmapped: list[Block] = []  # by address


class Allocator:
    """Bytes in, bytes out."""

    least_rest = SMALL + 1  # what is left of a block of the large pool is split off from this size on

    def __init__(self, cap: int = UNLIMITED) -> None:
        self.cap = cap
        self.pools: dict[int, tuple[Pool, Pool]] = {}  # by stream: large and small
        self.take_for(0)
        self.top = 0
        self.idle_segments = 0  # free as a whole
        self.reserved = self.allocated = self.reserved_peak = self.allocated_peak = 0

    def take_for(self, stream: int) -> None:
        """From now on blocks are taken for this stream."""
        if stream not in self.pools:
            self.pools[stream] = self._make_pool(small=False), self._make_pool(small=True)
        self.stream = stream

    def _make_pool(self, small: bool) -> Pool:
        return Pool(small)

    def empty_cache(self) -> None:
        """Give back the segments that are free as a whole."""
        if not self.idle_segments:
            return
        self.idle_segments = 0
        for pool in chain.from_iterable(self.pools.values()):
            self.reserved -= sum(size for size, _, block in pool.free if not (block.before or block.after))
            pool.free[:] = [entry for entry in pool.free if entry[2].before or entry[2].after]

    def _make_room(self, size: int) -> None:
        if self.reserved + size > self.cap:
            self.empty_cache()
            if self.reserved + size > self.cap:
                raise OutOfMemory(size)

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.reserved_peak = max(self.reserved_peak, self.reserved)

    def _best_fit(self, size: int, pool: Pool) -> Block | None:
        at = bisect_left(pool.free, (size,))
        if at == len(pool.free):
            return None
        block = pool.free.pop(at)[2]
        self.idle_segments -= not (block.before or block.after)
        return block

    def _more(self, size: int, pool: Pool) -> Block:
        size = segment_size(size, pool.small)
        self._make_room(size)
        self._reserve(size)
        self.top += size + (1 << 30)  # segments are never neighbours
        return Block(self.top - size, size, pool, None, None)

    def malloc(self, size: int) -> Block:
        """A block of at least `size` bytes; raises OutOfMemory under the cap."""
        size = max(ROUNDING, rounded(size, ROUNDING))
        pool = self.pools[self.stream][size <= SMALL]
        block = self._best_fit(size, pool) or self._more(size, pool)
        rest = block.size - size
        if rest >= (ROUNDING if pool.small else self.least_rest):
            other = _split(block, size)
            other.free = True
            self._keep(other)
        block.free = False
        self.allocated += block.size
        self.allocated_peak = max(self.allocated_peak, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Back to its pool, merged with free neighbours."""
        self.allocated -= block.size
        block.free = True
        self._merge_free(block)
        self.idle_segments += not (block.before or block.after)
        self._keep(block)

    def _merge_free(self, block: Block) -> None:
        for other in (block.after, block.before):
            if other and other.free:
                self._take(other)
                _absorb(block, other)

    def _keep(self, block: Block) -> None:
        insort(block.pool.free, (block.size, block.address, block))

    def _take(self, block: Block) -> None:
        free = block.pool.free
        del free[bisect_left(free, (block.size, block.address))]

    def try_workspace(self, sizes: Iterable[int]) -> None:
        """Take and give back the first of these sizes that there is room for: cuDNN has an algorithm for each."""
        for size in sizes:
            with contextlib.suppress(OutOfMemory):
                self.release(self.malloc(size))
                return


class ExpandableAllocator(Allocator):
    """With expandable segments. `reserved` is what is mapped, in pages of 2 and 20 MiB.

    Before it maps pages it asks for room for a whole segment, as if none of what is free beside them were used: under
    a cap of its own `reserved_peak` a trace may fail. And what it maps, rounded up to pages, may be above the cap by
    18 MiB. Each pool's addresses have no end here; PyTorch begins another range after 9/8 of the card's memory.
    """

    least_rest = ROUNDING

    # `top` and `idle_segments` stay 0: nothing is a segment of its own

    def _make_pool(self, small: bool) -> Pool:
        pool = Pool(small)
        addresses = Block(0, UNLIMITED, pool, None, None)
        addresses.mapped = False
        pool.unmapped.append(addresses)
        return pool

    def empty_cache(self) -> None:
        """Unmap the pages that are free as a whole."""
        for pool in chain.from_iterable(self.pools.values()):
            for _, _, block in tuple(pool.free):
                self._unmap(block)

    def _best_fit(self, size: int, pool: Pool) -> Block | None:
        def can_be(block: Block) -> int:
            return block.size + (block.after.size if block.after and not block.after.mapped else 0)

        free = pool.free
        at = bisect_left(free, (size,))
        while at + 1 < len(free) and can_be(free[at + 1][2]) < can_be(free[at][2]):
            at += 1  # of what can grow what it can grow to counts
        return free.pop(at)[2] if at < len(free) else None

    def _more(self, size: int, pool: Pool) -> Block:
        self._make_room(segment_size(size, pool.small))
        block = self._with_addresses(size, pool)
        if not block.mapped:
            self._map(block, size)
        while block.size < size:
            assert block.after
            more, block = size - block.size, block.after
            self._map(block, more)
        self._take(block)
        return block

    def _with_addresses(self, size: int, pool: Pool) -> Block:
        """The first block of the lowest run of blocks, free or without pages, that has room for `size` bytes."""
        for unmapped in pool.unmapped:
            first = unmapped.before if unmapped.before and unmapped.before.free else unmapped
            found = 0
            block: Block | None = first
            while block and found < size and (block.free or not block.mapped):
                found += block.size
                block = block.after
            if found >= size:
                return first
        raise AssertionError("addresses do not end")

    def _map(self, block: Block, size: int) -> None:
        """Map pages to the first `size` bytes of a block, or all of it."""
        size = min(rounded(size, _page(block)), block.size)
        self._forget(block)
        if size < block.size:
            rest = _split(block, size)
            rest.mapped = False
            self._remember(rest)
        self._reserve(size)
        block.mapped = block.free = True
        self._merge_free(block)
        self._keep(block)

    def _unmap(self, block: Block) -> None:
        """Unmap the pages that lie within a free block."""
        page = _page(block)
        begin, end = rounded(block.address, page), (block.address + block.size) // page * page
        if begin >= end:
            return
        self._take(block)
        if begin > block.address:
            before, block = block, _split(block, begin - block.address)
            self._keep(before)
        if end < block.address + block.size:
            after = _split(block, end - block.address)
            after.free = True
            self._keep(after)
        self.reserved -= block.size
        block.mapped = block.free = False
        for other in (block.after, block.before):
            if other and not other.mapped:
                self._forget(other)
                _absorb(block, other)
        self._remember(block)

    def _remember(self, block: Block) -> None:
        insort(block.pool.unmapped, block, key=lambda one: one.address)

    def _forget(self, block: Block) -> None:
        blocks = block.pool.unmapped
        del blocks[bisect_left(blocks, block.address, key=lambda one: one.address)]


def segment_size(size: int, small: bool) -> int:
    """Of the segment that a request of `size` bytes makes, in bytes."""
    if small:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < OWN_SEGMENT else rounded(size, SEGMENT_ROUNDING)


def _page(block: Block) -> int:
    return SMALL_SEGMENT if block.pool.small else LARGE_SEGMENT


def _split(block: Block, size: int) -> Block:
    """Cut a block after `size` bytes; the rest."""
    rest = Block(block.address + size, block.size - size, block.pool, block, block.after)
    if block.after:
        block.after.before = rest
    block.after, block.size = rest, size
    return rest


def _absorb(block: Block, other: Block) -> None:
    """Let a block have what its neighbour has."""
    if other is block.before:
        block.address, block.before = other.address, other.before
        if other.before:
            other.before.after = block
    else:
        block.after = other.after
        if other.after:
            other.after.before = block
    block.size += other.size


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
    allocator = ExpandableAllocator(cap) if expandable else Allocator(cap)
    blocks: dict[int, Block] = {}
    result = Replay()
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
        elif isinstance(value, str) and value.startswith("stream:"):
            allocator.take_for(int(value.removeprefix("stream:")))
        elif isinstance(value, str):
            leave()
            phase = value.removeprefix("enter:")
        else:
            allocator.try_workspace(value)  # type: ignore[arg-type]
    leave()
    result.reserved_peak = allocator.reserved_peak
    return result


def smallest_cap(events: Sequence[Event], low: int, high: int, tolerance: int, expandable: bool = False) -> int:
    """A cap in (low, high], in bytes, under which the trace completes and below which, by `tolerance`, it does not;
    under `high` it must. Where it completes under some lower cap again, that may not be found."""
    while high - low > tolerance:
        cap = (low + high) // 2
        try:
            replay(events, cap, expandable)
            high = cap
        except OutOfMemory:
            low = cap
    return high

"""The model of PyTorch's caching allocator against traces worked out by hand from CUDACachingAllocator.cpp."""

import contextlib
import random
from itertools import chain, permutations

import pytest

from pytest_vram.measure.allocator import (
    Allocator,
    Block,
    Event,
    ExpandableAllocator,
    OutOfMemory,
    Pool,
    replay,
    smallest_cap,
)

KIB, MIB = 1 << 10, 1 << 20


def held(allocator: Allocator) -> tuple[float, float]:
    """MiB (allocated, reserved)."""
    return allocator.allocated / MIB, allocator.reserved / MIB


@pytest.mark.parametrize(
    ("size", "taken"), [(1, 512), (512, 512), (513, 1024), (MIB - 1, MIB), (3 * MIB + 1, 3 * MIB + 512)]
)
def test_sizes_are_rounded_to_512_bytes(size: int, taken: int) -> None:
    allocator = Allocator()
    assert allocator.malloc(size).size == taken == allocator.allocated == allocator.allocated_peak


@pytest.mark.parametrize(
    ("size", "segment_mib"),
    [
        (1, 2),
        (MIB, 2),
        (MIB + 1, 20),
        (10 * MIB - 512, 20),
        (10 * MIB - 511, 10),  # rounded first
        (10 * MIB, 10),
        (10 * MIB + 1, 12),
        (12 * MIB, 12),
        (21 * MIB, 22),
        (1001 * MIB, 1002),
    ],
)
def test_a_request_takes_the_segment_of_its_size(size: int, segment_mib: int) -> None:
    allocator = Allocator()
    allocator.malloc(size)
    assert allocator.reserved == allocator.reserved_peak == segment_mib * MIB


@pytest.mark.parametrize(
    ("size", "allocated"),
    [
        (11 * MIB, 12 * MIB),  # 1 MiB would remain of 12: too little to split
        (11 * MIB - 512, 11 * MIB - 512),
        (10 * MIB, 10 * MIB),
        (9 * MIB, 9 * MIB),
    ],
)
def test_a_large_block_is_split_when_more_than_1_mib_remains(size: int, allocated: int) -> None:
    allocator = Allocator()
    allocator.malloc(size)
    assert allocator.allocated == allocated
    rest = allocator.reserved - allocated
    if rest:
        allocator.malloc(rest)
        assert allocator.allocated == allocator.reserved  # the rest is there to be used


def test_a_small_block_is_split_down_to_512_bytes() -> None:
    allocator = Allocator()
    for size in (MIB, MIB - 512, 512):
        allocator.malloc(size)
    assert held(allocator) == (2, 2)
    allocator.malloc(1)
    assert allocator.reserved == 4 * MIB


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    allocator = Allocator()
    blocks = [allocator.malloc(mib * MIB) for mib in (14, 12, 16)]
    for block in blocks:
        allocator.release(block)
    for mib in (11, 13, 15):  # each in the segment just above it
        allocator.malloc(mib * MIB)
    assert held(allocator) == (12 + 14 + 16, 42)


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_free_neighbours_merge_in_any_order(order: tuple[int, ...]) -> None:
    allocator = Allocator()
    blocks = [allocator.malloc(5 * MIB) for _ in range(3)]
    assert held(allocator) == (15, 20)
    for index in order:
        allocator.release(blocks[index])
    assert held(allocator) == (0, 20)
    allocator.malloc(20 * MIB)
    assert held(allocator) == (20, 20)


def test_a_block_in_use_keeps_its_neighbours_apart() -> None:
    allocator = Allocator()
    blocks = [allocator.malloc(5 * MIB) for _ in range(3)]
    allocator.release(blocks[0])
    allocator.release(blocks[2])  # free now: 5 before, 10 behind
    allocator.malloc(11 * MIB)
    assert held(allocator) == (5 + 12, 20 + 12)
    allocator.malloc(10 * MIB)
    allocator.malloc(5 * MIB)
    assert held(allocator) == (32, 32)


def test_segments_do_not_merge_and_pools_do_not_lend() -> None:
    allocator = Allocator()
    for block in [allocator.malloc(10 * MIB) for _ in range(2)]:
        allocator.release(block)
    allocator.malloc(20 * MIB)
    assert allocator.reserved == 40 * MIB
    allocator.malloc(512)  # though 20 MiB are free in the large pool
    assert allocator.reserved == 42 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_streams_do_not_lend_and_are_flushed_together(expandable: bool) -> None:
    allocator = ExpandableAllocator(64 * MIB) if expandable else Allocator(64 * MIB)
    allocator.take_for(1)
    copy = allocator.malloc(40 * MIB)
    allocator.release(copy)
    allocator.take_for(0)
    first = allocator.malloc(20 * MIB)
    assert held(allocator) == (20, 60), "what stream 1 has free is not stream 0's"
    allocator.release(first)
    allocator.take_for(1)
    again = allocator.malloc(40 * MIB)
    assert again.address == copy.address
    allocator.take_for(0)
    allocator.malloc(20 * MIB)
    assert held(allocator) == (60, 60)
    with pytest.raises(OutOfMemory):
        allocator.malloc(20 * MIB)
    allocator.release(again)
    allocator.malloc(40 * MIB)  # once what stream 1 has free is given back
    assert held(allocator) == (60, 60)


def test_a_block_goes_back_to_the_stream_it_was_taken_for() -> None:
    events: list[Event] = [(0, "stream:2"), (1, 30 * MIB), (0, "stream:0"), (-1, 0), (2, 30 * MIB)]
    assert replay(events).reserved_peak == 60 * MIB
    assert replay([*events[:-1], (0, "stream:2"), (2, 30 * MIB)]).reserved_peak == 30 * MIB
    replay(events, cap=30 * MIB)  # it is flushed for the other one


def test_empty_cache_gives_back_whole_segments_only() -> None:
    allocator = Allocator()
    front, kept, behind = [allocator.malloc(5 * MIB) for _ in range(3)]
    own, small = allocator.malloc(12 * MIB), allocator.malloc(512)
    assert allocator.reserved == (20 + 12 + 2) * MIB
    for block in (front, behind, own, small):
        allocator.release(block)
    allocator.empty_cache()
    assert held(allocator) == (5, 20)
    allocator.release(kept)
    allocator.empty_cache()
    assert held(allocator) == (0, 0)
    assert allocator.reserved_peak == 34 * MIB
    allocator.malloc(12 * MIB)  # nothing that was given back is used again
    assert held(allocator) == (12, 12)


def test_the_cap_is_met_exactly_and_the_cache_is_flushed_before_it_is_missed() -> None:
    allocator = Allocator(cap=30 * MIB)
    first = allocator.malloc(12 * MIB)
    allocator.malloc(18 * MIB)
    assert allocator.reserved == 30 * MIB
    with pytest.raises(OutOfMemory):
        allocator.malloc(512)
    allocator.release(first)
    allocator.malloc(512)  # the 12 MiB are flushed
    assert allocator.reserved == 20 * MIB
    assert allocator.reserved_peak == 30 * MIB


@pytest.mark.parametrize(("cap", "reserved"), [(32, 32), (31, 20)])
def test_the_cache_is_flushed_only_when_it_must_be(cap: int, reserved: int) -> None:
    allocator = Allocator(cap * MIB)
    allocator.release(allocator.malloc(12 * MIB))
    allocator.malloc(20 * MIB)
    assert held(allocator) == (20, reserved)


def test_a_used_part_of_a_segment_keeps_all_of_it_from_the_flush() -> None:
    allocator = Allocator(cap=30 * MIB)
    kept, freed = allocator.malloc(2 * MIB), allocator.malloc(9 * MIB)
    allocator.release(freed)
    with pytest.raises(OutOfMemory):
        allocator.malloc(19 * MIB)  # 20 + 20 of 30, though only 2 are in use
    allocator.release(kept)
    allocator.malloc(19 * MIB)
    assert held(allocator) == (20, 20)


@pytest.mark.parametrize(("cap", "allocated", "reserved"), [(42, 42, 42), (41, 12, 12)])
def test_an_optional_workspace_is_done_without_under_the_cap(cap: int, allocated: int, reserved: int) -> None:
    result = replay([(1, 12 * MIB), (0, (30 * MIB,)), (-1, 0)], cap * MIB)
    assert (result.allocated_peak, result.reserved_peak) == (allocated * MIB, reserved * MIB)


@pytest.mark.parametrize(
    ("cap", "allocated", "reserved"),
    [(42, 42, 42), (41, 28, 28), (28, 28, 28), (27, 12, 12)],
    ids=["first", "second", "second just fits", "none"],
)
def test_of_two_workspaces_the_first_that_fits_is_taken(cap: int, allocated: int, reserved: int) -> None:
    result = replay([(1, 12 * MIB), (0, (30 * MIB, 16 * MIB)), (-1, 0)], cap * MIB)
    assert (result.allocated_peak, result.reserved_peak) == (allocated * MIB, reserved * MIB)


def test_a_workspace_is_given_back_at_once_and_leaves_its_segment_in_the_cache() -> None:
    allocator = Allocator()
    allocator.try_workspace((16 * MIB, 30 * MIB))
    assert held(allocator) == (0, 16)  # the larger one was not tried after it
    allocator.malloc(16 * MIB)
    assert held(allocator) == (16, 16)


def test_the_cache_is_flushed_for_the_first_choice() -> None:
    allocator = Allocator(cap=30 * MIB)
    allocator.release(allocator.malloc(12 * MIB))
    allocator.try_workspace((20 * MIB, 12 * MIB))  # the second would fit without a flush
    assert held(allocator) == (0, 20)
    assert allocator.allocated_peak == 20 * MIB


@pytest.mark.parametrize(("sizes", "reserved"), [((40,), 10), ((40, 30), 10), ((40, 30, 16), 26)])
def test_a_choice_that_is_refused_has_flushed_the_cache(sizes: tuple[int, ...], reserved: int) -> None:
    allocator = Allocator(cap=30 * MIB)
    _kept, freed = allocator.malloc(10 * MIB), allocator.malloc(18 * MIB)
    allocator.release(freed)
    assert held(allocator) == (10, 28)
    allocator.try_workspace(size * MIB for size in sizes)
    assert held(allocator) == (10, reserved)


def test_each_phase_has_its_own_allocated_peak() -> None:
    trace: list[Event] = [
        (1, 4 * MIB),
        (0, "enter:encode"),
        (2, 3 * MIB),
        (-2, 0),
        (0, "enter:denoise"),
        (3, 2 * MIB),
        (-3, 0),
        (0, "enter:decode"),
        (0, (6 * MIB,)),
        (0, "enter:encode"),  # the second call
        (-1, 0),
        (0, "enter:denoise"),
        (4, 7 * MIB),
    ]
    result = replay(trace)
    mib = {phase: peak // MIB for phase, peak in result.phases.items()}
    assert mib == {"load": 4, "encode": 7, "denoise": 7, "decode": 10}
    assert result.allocated_peak == 10 * MIB
    assert result.reserved_peak == 20 * MIB


def test_empty_cache_in_a_trace() -> None:
    trace: list[Event] = [(1, 12 * MIB), (-1, 0), (0, "empty_cache"), (2, 14 * MIB)]
    assert replay(trace).reserved_peak == 14 * MIB
    assert replay([event for event in trace if event[1] != "empty_cache"]).reserved_peak == 26 * MIB


FLUSHED: list[Event] = [(1, 12 * MIB), (-1, 0), (2, 20 * MIB)]
FRAGMENTED: list[Event] = [(1, 5 * MIB), (2, 5 * MIB), (3, 5 * MIB), (-2, 0), (4, 6 * MIB)]
WORKSPACE: list[Event] = [(1, 12 * MIB), (0, (100 * MIB, 50 * MIB)), (2, 10 * MIB)]


@pytest.mark.parametrize("tolerance", [512, 64 * KIB, 4 * MIB])
@pytest.mark.parametrize(
    ("trace", "free", "need"),
    [(FLUSHED, 32, 20), (FRAGMENTED, 40, 40), (WORKSPACE, 112, 22)],
    ids=["flushed", "fragmented", "workspace"],
)
def test_the_smallest_cap_is_found_to_the_tolerance(trace: list[Event], free: int, need: int, tolerance: int) -> None:
    high = replay(trace).reserved_peak
    assert high == free * MIB
    found = smallest_cap(trace, 0, high, tolerance)
    assert need * MIB <= found < need * MIB + tolerance
    replay(trace, found)
    with pytest.raises(OutOfMemory):
        replay(trace, found - tolerance)


# Expandable segments


def test_expandable_segments_lose_nothing_to_20_mib_segments() -> None:
    trace: list[Event] = [(number, 6 * MIB) for number in range(1, 11)]
    assert replay(trace).reserved_peak == 80 * MIB  # three to a segment
    assert replay(trace, expandable=True).reserved_peak == 60 * MIB


def test_expandable_segments_grow_by_pages_from_the_free_tail() -> None:
    allocator = ExpandableAllocator()
    for size, reserved in ((21, 40), (19, 40), (30, 80), (25, 100), (5, 100), (1, 102), (1, 102), (1, 104)):
        allocator.malloc(size * MIB)
        assert allocator.reserved == reserved * MIB


def test_expandable_segments_split_down_to_512_bytes() -> None:
    size = 20 * MIB - 512
    native, expandable = Allocator(), ExpandableAllocator()
    native.malloc(size)
    expandable.malloc(size)
    assert (native.allocated, expandable.allocated) == (20 * MIB, size)


def test_expandable_blocks_merge_and_are_used_again() -> None:
    allocator = ExpandableAllocator()
    blocks = [allocator.malloc(20 * MIB) for _ in range(3)]
    for block in blocks:
        allocator.release(block)
    allocator.malloc(70 * MIB)  # three merged, and one page more
    assert held(allocator) == (70, 80)


def test_expandable_segments_save_the_tail_for_what_needs_it() -> None:
    """get_free_block: for best fit a block at the end counts as large as it could grow."""
    allocator = ExpandableAllocator()
    first, *_ = [allocator.malloc(mib * MIB) for mib in (30, 20, 15)]
    allocator.release(first)  # free now: 30 at the front, 15 at the end of 80
    allocator.malloc(12 * MIB)  # from the 30, though 15 would fit more tightly
    assert held(allocator) == (47, 80)
    allocator.malloc(28 * MIB)  # no longer fits at the front: the tail and one page more
    assert held(allocator) == (75, 100)


def test_free_pages_are_unmapped_before_it_gives_up() -> None:
    allocator = ExpandableAllocator(cap=100 * MIB)
    first, middle, _ = [allocator.malloc(mib * MIB) for mib in (30, 20, 30)]
    assert held(allocator) == (80, 80)
    allocator.release(first)
    allocator.release(middle)  # 50 free at the front
    allocator.malloc(60 * MIB)  # the two whole pages of them are unmapped: 40 to 60 is used in part
    assert held(allocator) == (90, 100)
    with pytest.raises(OutOfMemory):
        allocator.malloc(20 * MIB)


def test_pages_that_are_partly_used_stay() -> None:
    allocator = ExpandableAllocator(cap=80 * MIB)
    blocks = [allocator.malloc(10 * MIB) for _ in range(8)]
    for block in blocks[::2]:
        allocator.release(block)  # half of each page
    assert held(allocator) == (40, 80)
    allocator.empty_cache()
    assert allocator.reserved == 80 * MIB
    with pytest.raises(OutOfMemory):
        allocator.malloc(11 * MIB)
    allocator.release(blocks[1])
    allocator.empty_cache()
    assert held(allocator) == (30, 60)


def test_unmapped_addresses_are_mapped_again_where_there_is_room() -> None:
    allocator = ExpandableAllocator()
    first, small, second = [allocator.malloc(mib * MIB) for mib in (40, 5, 15)]
    allocator.release(first)
    allocator.empty_cache()
    assert held(allocator) == (20, 20)
    assert allocator.malloc(30 * MIB).address == 0  # in the hole
    assert held(allocator) == (50, 60)
    assert allocator.malloc(20 * MIB).address == 60 * MIB  # 10 are left in it
    allocator.release(small)
    allocator.release(second)
    allocator.empty_cache()
    assert held(allocator) == (50, 60), "10 of a page, then 20 of its own"


def test_what_is_mapped_with_free_pages_beside_it_asks_for_a_whole_segment() -> None:
    """alloc_block holds the size of a new segment against the limit, though part of it is mapped already."""
    allocator = ExpandableAllocator(cap=100 * MIB)
    allocator.malloc(61 * MIB)  # 19 free at the end of 80
    with pytest.raises(OutOfMemory):
        allocator.malloc(25 * MIB)  # one page more would do, but 80 + 26 is above 100
    assert held(allocator) == (61, 80)


def test_the_smallest_cap_with_expandable_segments() -> None:
    trace: list[Event] = [(1, 61 * MIB), (2, 25 * MIB)]
    reserved = replay(trace, expandable=True).reserved_peak
    assert reserved == 100 * MIB
    with pytest.raises(OutOfMemory):
        replay(trace, reserved, expandable=True)  # 80 are mapped, 26 asked for
    need = smallest_cap(trace, 80 * MIB, reserved + 42 * MIB, 4 * KIB, expandable=True)
    assert 0 <= need - 106 * MIB <= 4 * KIB
    assert smallest_cap(trace, 80 * MIB, reserved, 4 * KIB) <= 88 * MIB + 4 * KIB  # in 62 and 26


def test_a_run_of_addresses_goes_across_free_blocks_between_holes() -> None:
    allocator = ExpandableAllocator()
    blocks = [allocator.malloc(mib * MIB) for mib in (50, 10, 50, 10)]
    allocator.release(blocks[0])
    allocator.release(blocks[2])
    allocator.empty_cache()  # left mapped: 40 to 60, of which 50 to 60 is used, and 100 to 120, used from 110
    assert held(allocator) == (20, 40)
    allocator.release(blocks[1])  # free: 40 to 60, between two holes
    assert allocator.malloc(105 * MIB).address == 0
    assert held(allocator) == (115, 120)


def test_of_several_blocks_that_can_grow_the_one_that_grows_least_is_taken() -> None:
    allocator = ExpandableAllocator()
    _, small_hole, _, large_hole, _ = [allocator.malloc(mib * MIB) for mib in (6, 54, 7, 93, 8)]
    allocator.release(small_hole)
    allocator.release(large_hole)
    allocator.empty_cache()
    assert held(allocator) == (21, 60)  # free: 12 before no end, 13 before a hole of 80, 14 before one of 40
    assert allocator.malloc(12 * MIB).address == 6 * MIB


@pytest.mark.parametrize("seed", range(60))
def test_whatever_comes_and_goes_the_books_balance(seed: int) -> None:
    draw = random.Random(seed)
    allocator = ExpandableAllocator(draw.choice([1 << 62, draw.randint(30, 600) * MIB]))
    live: list[Block] = []
    for _ in range(draw.randint(20, 150)):
        allocator.take_for(draw.choice([0, 0, 1]))
        if (what := draw.random()) < 0.55:
            with contextlib.suppress(OutOfMemory):
                live.append(allocator.malloc(draw.choice([draw.randint(1, MIB), draw.randint(1, 60) * MIB])))
        elif what < 0.95 and live:
            allocator.release(live.pop(draw.randrange(len(live))))
        elif what > 0.98:
            allocator.empty_cache()
        pools = chain.from_iterable(allocator.pools.values())
        assert allocator.reserved == sum(mapped_in_order(pool, live) for pool in pools)
        assert allocator.reserved <= allocator.cap + 18 * MIB
    for block in live:
        allocator.release(block)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)
    assert {len(pool.unmapped) for pool in chain.from_iterable(allocator.pools.values())} == {1}


def mapped_in_order(pool: Pool, live: list[Block]) -> int:
    """Bytes that are mapped in this pool, all of whose blocks are found to be where they belong."""
    blocks = [pool.unmapped[-1]]  # which has no end
    while (before := blocks[0].before) is not None:
        assert before.after is blocks[0]
        assert before.address + before.size == blocks[0].address
        assert not (before.free and blocks[0].free), "free neighbours merge"
        assert before.mapped or blocks[0].mapped, "neighbours without pages merge"
        blocks.insert(0, before)
    assert blocks[0].address == 0
    assert sorted((one.size, one.address) for one in blocks if one.free) == [e[:2] for e in pool.free]
    assert [one for one in blocks if not one.mapped] == pool.unmapped
    used = [one for one in blocks if one.mapped and not one.free]
    assert set(map(id, used)) == {id(one) for one in live if one.pool is pool}
    return sum(one.size for one in blocks if one.mapped)

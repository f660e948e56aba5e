"""Blocks: reference counts, the order of the free list, and what is found by its hash."""

from __future__ import annotations

from lightvllm.engine.block_manager import BlockManager, hash_block


def hashes(*blocks: list[int]) -> list[bytes]:
    chained: list[bytes] = []
    for tokens in blocks:
        chained.append(hash_block(chained[-1] if chained else b"", tokens))
    return chained


def test_a_hash_covers_the_tokens_and_all_before_them() -> None:
    first, second = hashes([1, 2], [3, 4])
    assert second == hash_block(first, [3, 4])
    assert second != hash_block(b"", [3, 4])
    assert first != hash_block(b"", [2, 1])
    assert hash_block(b"", [0x01020304]) != hash_block(b"", [4, 3, 2, 1])


def test_a_hash_is_the_same_in_every_process() -> None:
    # printf '\x01\0\0\0…\x04\0\0\0' | b2sum -l 128
    assert hash_block(b"", [1, 2, 3, 4]).hex() == "5c3887ef44b86da26265cb5c108a056b"


def test_blocks_are_handed_out_and_taken_back() -> None:
    manager = BlockManager(3)
    assert manager.acquire((), 2) == [0, 1]
    assert manager.num_free == 1
    manager.release([0, 1])
    assert manager.num_free == 3
    assert [manager.ref_count(b) for b in range(3)] == [0, 0, 0]


def test_a_match_is_the_longest_known_prefix() -> None:
    manager = BlockManager(4)
    a, b, c = hashes([1, 1], [2, 2], [3, 3])
    blocks = manager.acquire((), 3)
    manager.register(blocks[0], a)
    manager.register(blocks[2], c)
    assert manager.match([a, b, c]) == [blocks[0]]
    manager.register(blocks[1], b)
    assert manager.match([a, b, c]) == blocks
    assert manager.match([b]) == [blocks[1]]
    assert manager.match([]) == []


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    manager = BlockManager(2)
    (block,) = manager.acquire((), 1)
    manager.register(block, hashes([1, 1])[0])
    assert manager.cost([block], 1) == 1, "a held block costs nothing"
    assert manager.acquire([block], 0) == [block]
    assert manager.ref_count(block) == 2
    manager.release([block])
    assert manager.num_free == 1
    manager.release([block])
    assert manager.num_free == 2
    assert manager.cost([block], 1) == 2, "a free one is taken from the free list"


def test_a_free_block_is_found_until_it_is_handed_out() -> None:
    manager = BlockManager(1)
    (digest,) = hashes([1, 1])
    manager.register(manager.acquire((), 1)[0], digest)
    manager.release([0])
    assert manager.match([digest]) == [0]
    assert manager.acquire((), 1) == [0]
    assert manager.match([digest]) == []


def test_matched_blocks_are_not_evicted_to_make_room_for_the_others() -> None:
    manager = BlockManager(3)
    a, b = hashes([1, 1], [2, 2])
    blocks = manager.acquire((), 2)
    manager.register(blocks[0], a)
    manager.register(blocks[1], b)
    manager.release(blocks)
    matched = manager.match([a])
    assert manager.acquire(matched, 2) == [0, 2, 1], "the third block has no hash and goes before the cached one"
    assert manager.match([a, b]) == [0]


def test_the_end_of_a_prefix_is_evicted_before_its_beginning_and_old_before_new() -> None:
    manager = BlockManager(4)
    old, new = hashes([1, 1], [2, 2]), hashes([3, 3], [4, 4])
    for prefix in (old, new):
        blocks = manager.acquire((), 2)
        for block, digest in zip(blocks, prefix, strict=True):
            manager.register(block, digest)
    manager.release([0, 1])
    manager.release([2, 3])
    gone = []
    for _ in range(4):
        manager.acquire((), 1)
        gone.append([i for i, digest in enumerate([*old, *new]) if not manager.match([digest])])
    assert gone == [[1], [0, 1], [0, 1, 3], [0, 1, 2, 3]]


def test_equal_blocks_computed_twice_are_found_once() -> None:
    manager = BlockManager(2)
    (digest,) = hashes([1, 1])
    first, second = manager.acquire((), 2)
    manager.register(first, digest)
    manager.register(second, digest)
    assert manager.match([digest]) == [first]
    manager.release([second])
    manager.acquire((), 1)
    assert manager.match([digest]) == [first], "the copy's eviction does not touch the shared one"

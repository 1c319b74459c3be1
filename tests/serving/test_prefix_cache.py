"""The index of the prefix cache: blocks are found by all tokens up to their end, and leave in the right order."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from para_jax.serving.prefix_cache import PrefixCache, prompt_key

SIZE = 4


def cache_of(blocks, **options):
    return PrefixCache(blocks, SIZE, "backbone", **options)


def filled(cache, ids):
    """The blocks of a prompt: found, or taken and published."""
    blocks = []
    for key in cache.keys(ids):
        block = cache.find(key)
        if block is None:
            block = cache.take()
            cache.publish(block, key)
        blocks.append(block)
    return blocks


def found(cache, ids):
    """How many blocks of a prompt are known from its beginning on."""
    keys = cache.keys(ids)
    return next((i for i, key in enumerate(keys) if key not in cache._of_key), len(keys))


def test_a_key_hashes_the_backbone_and_every_token_up_to_its_end():
    cache, ids = cache_of(1), list(range(3 * SIZE + 3))
    keys = cache.keys(ids)
    assert len(keys) == 3 and cache.keys(ids[: 2 * SIZE]) == keys[:2] and cache.keys(ids[: SIZE - 1]) == []
    assert PrefixCache(1, SIZE, "other").keys(ids)[0] != keys[0]
    for place in range(3 * SIZE):
        other = cache.keys([*ids[:place], 99, *ids[place + 1 :]])
        same = [a == b for a, b in zip(keys, other, strict=True)]
        assert same == [number < place // SIZE for number in range(3)]


def test_a_salt_changes_every_key():
    cache, ids = cache_of(8), list(range(3 * SIZE))
    plain, salted = cache.keys(ids), cache.keys(ids, "a")
    assert salted == cache.keys(ids, "a") and len({*plain, *salted, *cache.keys(ids, "b")}) == 9


def test_no_salt_gives_a_prompt_the_keys_of_longer_prompts():
    """Else a client could take the bytes of a prompt's first block as its salt. That prompt would find its blocks."""
    cache, ids = cache_of(8), list(range(40, 40 + 3 * SIZE))
    for blocks in (1, 2):
        begin, rest = ids[: blocks * SIZE], ids[blocks * SIZE :]
        salt = np.array(begin, np.int32).tobytes().decode()
        assert not {*cache.keys(rest, salt)} & {*cache.keys(ids)}
        assert not {*cache.keys(rest, salt)} & {*cache.keys(ids, "a")}


def test_prompts_that_agree_in_their_last_block_alone_share_nothing():
    cache = cache_of(8)
    filled(cache, [1, 2, 3, 4, 9, 9, 9, 9])
    assert found(cache, [5, 6, 7, 8, 9, 9, 9, 9]) == 0
    assert cache.keys([9, 9, 9, 9, 1])[0] != cache.keys([1, 2, 3, 4, 9, 9, 9, 9])[1]


def test_the_least_recently_used_prompt_leaves_first_and_its_end_before_its_beginning():
    cache = cache_of(6)
    a, b, c = (list(range(start, start + 3 * SIZE)) for start in (0, 100, 200))
    for ids in (a, b):
        cache.release(filled(cache, ids))
    cache.release(filled(cache, a))
    cache.release(filled(cache, c[:SIZE]))
    assert (found(cache, a), found(cache, b)) == (3, 2)
    cache.release(filled(cache, c))
    assert (found(cache, a), found(cache, b), found(cache, c)) == (3, 0, 3)


def test_a_block_that_a_prompt_refers_to_stays():
    cache, held = cache_of(3), [1, 2, 3, 4]
    blocks = filled(cache, held)
    for start in range(10, 100, 10):
        cache.release(filled(cache, list(range(start, start + 2 * SIZE))))
    assert filled(cache, held) == blocks
    cache.release(blocks), cache.release(blocks)
    cache.release(filled(cache, list(range(200, 212))))
    assert found(cache, held) == 0


def test_nothing_is_found_where_the_cache_is_off():
    cache = cache_of(4, enabled=False)
    cache.release(filled(cache, [1, 2, 3, 4]))
    assert found(cache, [1, 2, 3, 4]) == 0 and cache.known == 0


PROMPTS = [np.random.default_rng(i // 3).integers(0, 9, 16).tolist()[: 8 + i % 3 * 4] for i in range(9)]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["start", "end", "clear"]), st.integers(0, 8)), max_size=40))
def test_any_use_keeps_every_block_in_one_place_and_every_key_true(steps):
    """Four prompts of at most four blocks at work, and room for four cached blocks."""
    cache, working, content = cache_of(20), [], {}
    for action, number in steps:
        if action == "start" and len(working) < 4:
            blocks = []
            for key in cache.keys(PROMPTS[number]):
                block = cache.find(key)
                if block is None:
                    block = cache.take()
                    content[block] = key
                    cache.publish(block, key)
                assert content[block] == key
                blocks.append(block)
            working.append(blocks)
        elif action == "end" and working:
            cache.release(working.pop(number % len(working)))
        elif action == "clear":
            cache.clear()
            working = []
        used = [block for blocks in working for block in blocks]
        assert [cache._references[block] for block in range(1, 21)] == [used.count(block) for block in range(1, 21)]
        places = sorted([*cache._free, *cache._idle, *set(used)])
        assert places == list(range(1, 21)) and cache.available == 20 - len(set(used))


def test_a_prompts_key_holds_everything_that_its_prefill_depends_on_and_no_ids():
    ids = list(range(5000))
    keys = [prompt_key(*of) for of in ((None, ids), ("a", ids), (None, ids, "s"), (None, ids[:-1]), (None, ids[::-1]))]
    assert len(set(keys)) == 5 and keys[0] == prompt_key(None, tuple(ids))
    assert all(len(repr(key)) < 200 for key in keys), "a look at a waiting prompt hashes none of its ids again"

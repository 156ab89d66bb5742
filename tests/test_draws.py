"""Draws depend on their name alone, and on the definition of Philox alone."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforce.data.draws import uniforms

NAME = {"seed": 7, "set_name": "view/base", "key": "00000042", "index": 3}


def philox(counter: list[int], key: list[int]) -> list[int]:
    """One block of Philox4x64-10 as its paper defines it (Salmon et al. 2011)."""
    mask = 2**64 - 1
    for _ in range(10):
        product_0, product_1 = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (product_1 >> 64) ^ counter[1] ^ key[0],
            product_1 & mask,
            (product_0 >> 64) ^ counter[3] ^ key[1],
            product_0 & mask,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


def test_the_generator_is_philox_and_nothing_that_numpy_may_change() -> None:
    digest = hashlib.blake2b(json.dumps([7, "view/base", "00000042"]).encode(), digest_size=16).digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
    words = [word for block in range(1, 4) for word in philox([block, 0, 0, 3], key)]  # counts, then computes
    assert uniforms(**NAME, num=12).tolist() == [(word >> 11) / 2**53 for word in words]


def test_the_reference_itself_is_right() -> None:
    # Known answer of Random123, the authors' library: philox4x64-10 of zeros.
    answer = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox([0, 0, 0, 0], [0, 0]) == answer


def test_golden_values() -> None:
    # A change here is a change of every store: it needs a new format version.
    expected = [0.08519797253388495, 0.007195995723490278, 0.869323276216841, 0.9250145223372853]
    assert uniforms(**NAME, num=4).tolist() == expected


@pytest.mark.heavy
def test_the_same_in_another_process() -> None:
    code = f"from reinforce.data.draws import uniforms; print(uniforms(**{NAME!r}, num=30).tolist())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(there) == uniforms(**NAME, num=30).tolist()


def test_no_memory_of_earlier_draws() -> None:
    alone = uniforms(**NAME, num=8)
    np.random.default_rng().random(5)
    uniforms(**NAME | {"index": 4}, num=1000)
    np.testing.assert_array_equal(uniforms(**NAME, num=8), alone)


@pytest.mark.parametrize("other", [{"seed": 8}, {"set_name": "view/more"}, {"key": "00000043"}, {"index": 4}])
def test_every_part_of_the_name_matters(other: dict[str, object]) -> None:
    one, two = uniforms(**NAME, num=1000), uniforms(**NAME | other, num=1000)
    assert not np.isin(one, two).any()
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.1


def test_the_parts_of_a_name_do_not_run_together() -> None:
    assert uniforms(0, "ab", "c", 0, 1) != uniforms(0, "a", "bc", 0, 1)
    assert uniforms(1, "1", "c", 0, 1) != uniforms(11, "", "c", 0, 1)
    assert uniforms(0, 'a", "b', "c", 0, 1) != uniforms(0, "a", 'b", "c', 0, 1)


def test_no_item_runs_into_the_next() -> None:
    # A million numbers of one item share none with the first of its neighbours.
    long = uniforms(**NAME, num=1_000_000)
    for index in (2, 4):
        assert not np.isin(uniforms(**NAME | {"index": index}, num=100), long).any()


def test_uniform_in_the_unit_interval() -> None:
    numbers = np.concatenate([uniforms(0, "set", "key", index, 100) for index in range(500)])
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0 and numbers.max() < 1
    # Kolmogorov-Smirnov at p = 0.001.
    distance = np.abs(np.sort(numbers) - np.linspace(0, 1, len(numbers))).max()
    assert distance < 1.95 / np.sqrt(len(numbers))


@given(
    seed=st.integers(0, 2**70),
    set_name=st.text(),
    key=st.text(),
    index=st.integers(0, 2**63 - 1),
    num=st.integers(0, 40),
)
def test_any_name_has_draws_and_more_of_them_begin_the_same(
    seed: int, set_name: str, key: str, index: int, num: int
) -> None:
    more = uniforms(seed, set_name, key, index, num + 5)
    assert more.shape == (num + 5,)
    assert ((more >= 0) & (more < 1)).all()
    np.testing.assert_array_equal(uniforms(seed, set_name, key, index, num), more[:num])

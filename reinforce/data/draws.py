"""Random numbers that depend on nothing but their name.

A draw is a pure function of (seed, set, key, index), so it is the same for any worker, order or restart.
The generator is Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a counter-based
generator whose raw 64-bit words are fixed by its definition. Only raw words are used, since the higher-level
methods of numpy's generators may change from one numpy to the next.
"""

import hashlib
import json
from functools import lru_cache

import numpy as np


def uniforms(seed: int, set_name: str, key: str, index: int, num: int) -> np.ndarray:
    """`num` float64 numbers in [0, 1) for item `index` of set `set_name` of sample `key`."""
    words = np.random.Philox(key=_philox_key(seed, set_name, key), counter=[0, 0, 0, index]).random_raw(num)
    return (words >> np.uint64(11)) * 2.0**-53


@lru_cache(64)  # the items of a sample are drawn one after the other
def _philox_key(seed: int, set_name: str, key: str) -> int:
    name = json.dumps([seed, set_name, key]).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")

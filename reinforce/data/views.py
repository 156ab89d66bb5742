"""A view of a sample, out of its tar: bytes, picture, pixels."""

import numpy as np

from reinforce.data import augment, images
from reinforce.data.shards import Place
from reinforce.errors import ReplayError, SampleError, ShardError


def replayed(tar: str, place: Place, params: np.ndarray, size: tuple[int, int], view_px: int) -> np.ndarray:
    """The view (view_px, view_px, 3) uint8 of the image at `place` in a local tar; `params` and `size` as stored.

    Raises ShardError where there is no such image any more, ReplayError where it has another size.
    """
    try:
        with open(tar, "rb") as file:
            file.seek(place.offset)
            picture = images.decode(file.read(place.length))
        return augment.replay(picture, params, size, view_px)
    except (OSError, SampleError) as error:
        raise ShardError(f"{tar}: {place.key}: {error}; the tar has changed since it was reinforced") from error
    except ReplayError as error:
        raise ReplayError(f"{tar}: {place.key}: {error}") from error

"""A view of a sample, out of its tar: bytes, picture, pixels."""

import numpy as np

from reinforce.data import augment, images
from reinforce.data.shards import Place, image_digest
from reinforce.errors import ReplayError, SampleError, ShardError


def replayed(
    tar: str, place: Place, params: np.ndarray, size: tuple[int, int], view_px: int, digest: int | None = None
) -> np.ndarray:
    """The view (view_px, view_px, 3) uint8 of the image at `place` in a local tar; `params`, `size` and, if the store
    has one, `digest` as stored.

    Raises ShardError where there is no such image any more, ReplayError where it is another one or has another size.
    """
    try:
        with open(tar, "rb") as file:
            file.seek(place.offset)
            image = file.read(place.length)
        if digest is not None and image_digest(image) != digest:
            raise ReplayError("this is another image than the one that was reinforced; give the tar of the store")
        picture = images.decode(image)
        return augment.replay(picture, params, size, view_px)
    except (OSError, SampleError) as error:
        raise ShardError(f"{tar}: {place.key}: {error}; the tar has changed since it was reinforced") from error
    except ReplayError as error:
        raise ReplayError(f"{tar}: {place.key}: {error}") from error

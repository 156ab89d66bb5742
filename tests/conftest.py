import os

# Read once, when these libraries are first imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from reinforce.config import Recipe
from tests import tiny


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two tiny teachers of different kinds and a tiny captioner: 3 views, 2 captions, batches of 4."""
    return tiny.models(tmp_path_factory.mktemp("models") / "tiny")

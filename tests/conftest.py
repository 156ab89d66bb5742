import os

# Read once, when these libraries are first imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

from reinforce.config import Recipe  # noqa: E402
from tests import tiny  # noqa: E402


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two tiny teachers of different kinds and a tiny captioner: 3 views, 2 captions, batches of 4."""
    return tiny.models(tmp_path_factory.mktemp("models") / "tiny")

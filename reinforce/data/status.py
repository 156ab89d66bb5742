"""Why a sample is in quarantine."""

from enum import IntEnum


class Status(IntEnum):
    """0, or why a sample is in quarantine. Stored as uint8: a number keeps its meaning for ever."""

    GOOD = 0
    DUPLICATE_KEY = 1
    MISSING_IMAGE = 2
    EMPTY_IMAGE = 3
    UNKNOWN_IMAGE_FORMAT = 4
    TRUNCATED_IMAGE = 5
    BROKEN_IMAGE = 6
    TOO_MANY_PIXELS = 7
    MISSING_CAPTION = 8
    EMPTY_CAPTION = 9
    CAPTION_NOT_UTF8 = 10
    CAPTION_NOT_TEXT = 11
    CAPTION_JSON_BROKEN = 12
    NO_RECORD = 13  # in what was imported
    OTHER_SIZE = 14  # than the image that was reinforced elsewhere
    FILE_TOO_LARGE = 15

    @property
    def reason(self) -> str:
        """The name in reports: lower case, with underscores."""
        return self.name.lower()

"""Debian's colour emoji as webdataset tars: 128 px pictures with their Unicode names as captions.

The font, the names and the keywords come from three Debian packages, fetched with apt-get into a temporary folder.
Same packages, same seed, same Pillow: same bytes.
"""

import dataclasses
import hashlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from fontTools.ttLib import TTFont
from PIL import Image

from reinforce.data import shards
from reinforce.data.draws import uniforms
from reinforce.errors import ConfigError

PACKAGES = ("fonts-noto-color-emoji", "unicode-data", "unicode-cldr-core")
FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
UNICODE = "usr/share/unicode"
NUM_HELDOUT = 120
NUM_TRAIN_SHARDS = 4
SIDE_PX = 128
# How many emoji of a group; the groups that are not named here are taken whole. Most of Unicode's list is one person
# in every skin tone and one flag per country: a part of them is enough to learn from.
MOST = {"People & Body": 480, "Symbols": 60, "Flags": 45}
SKIN_TONES = frozenset({0x1F3FB, 0x1F3FC, 0x1F3FD, 0x1F3FE, 0x1F3FF})
PRESENTATION = 0xFE0F  # asks for the colour form; fonts leave it out of their ligatures
TEMPLATES = ("{}", "{}", "an emoji of {}", "a picture of {}", "a drawing of {}")
NO_ARTICLE = {  # mass nouns, and names that are no nouns
    "bread", "rice", "sushi", "spaghetti", "fire", "honey", "ice", "water", "wind", "fog", "salt", "butter", "garlic",
    "ginger", "luggage", "money", "sake", "rain", "snow", "corn", "popcorn", "seaweed", "coral", "hair", "weather",
    "clothing", "makeup", "foggy", "dizzy", "rolling", "breast-feeding", "laughing",
}  # fmt: skip
KINDS = {  # what a subgroup holds
    "face-smiling": "a smiley", "face-affection": "a smiley", "face-tongue": "a smiley",
    "face-concerned": "a sad smiley", "face-negative": "an angry smiley", "face-unwell": "an ill smiley",
    "face-costume": "a fantasy face", "cat-face": "a cat", "monkey-face": "a monkey", "heart": "a heart",
    "hand-fingers-open": "a hand", "hand-fingers-partial": "a hand", "hand-single-finger": "a hand",
    "hand-fingers-closed": "a fist", "hands": "hands", "body-parts": "a part of the body", "person": "a person",
    "person-gesture": "a gesture", "person-role": "a job", "person-fantasy": "a figure of fantasy",
    "person-activity": "an activity", "person-sport": "a sport", "animal-mammal": "a mammal", "animal-bird": "a bird",
    "animal-reptile": "a reptile", "animal-marine": "a sea animal", "animal-bug": "an insect",
    "plant-flower": "a flower", "plant-other": "a plant", "food-fruit": "a fruit", "food-vegetable": "a vegetable",
    "food-prepared": "a meal", "food-asian": "Asian food", "food-marine": "seafood", "food-sweet": "a sweet",
    "drink": "a drink", "place-geographic": "a landscape", "place-building": "a building",
    "place-religious": "a place of worship", "transport-ground": "a vehicle", "transport-water": "a vessel",
    "transport-air": "an aircraft", "time": "the time", "sky & weather": "sky and weather", "sport": "sports gear",
    "game": "a game", "clothing": "something to wear", "musical-instrument": "a musical instrument",
    "computer": "a computer thing", "book-paper": "paper", "money": "money", "office": "office supplies",
    "tool": "a tool", "science": "science", "medical": "medicine", "household": "a household thing",
    "geometric": "a shape", "arrow": "an arrow", "zodiac": "a sign of the zodiac",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Emoji:
    codepoints: tuple[int, ...]
    name: str
    group: str
    subgroup: str

    @property
    def key(self) -> str:
        """Code points in hexadecimal, as Noto names its files: `1f44d-1f3fd`."""
        return "-".join(f"{point:04x}" for point in self.codepoints)


def fetch(folder: Path) -> None:
    """Unpack PACKAGES under `folder`, with nothing installed. Raises ConfigError where apt cannot do it."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise ConfigError(
            "the samples are made of Debian packages: run this where apt-get and dpkg are (Debian, Ubuntu)"
        )
    got = subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True)
    if got.returncode:
        raise ConfigError(f"apt-get download failed; try `apt-get update` first\n{got.stderr.strip()}")
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)


def write_tars(root: Path, out: Path, seed: int) -> None:
    """Write `out/train/*.tar` and `out/heldout/00000.tar` from the packages unpacked under `root`."""
    pictures = draw(root / FONT, read_names(root))
    chosen = choose(list(pictures), seed)
    heldout, train = chosen[:NUM_HELDOUT], chosen[NUM_HELDOUT:]
    size = -(-len(train) // NUM_TRAIN_SHARDS)
    tars = {f"train/{i:05d}.tar": train[i * size : (i + 1) * size] for i in range(NUM_TRAIN_SHARDS)}
    keywords, blocks = read_keywords(root), read_blocks(root)
    groups = list(dict.fromkeys(emoji.group for emoji in pictures))
    for name, emojis in {**tars, "heldout/00000.tar": heldout}.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        samples = []
        for emoji in emojis:
            captions = describe(emoji, keywords.get(emoji.codepoints, []))
            template = TEMPLATES[int(uniforms(seed, "emoji-template", emoji.key, 0, 1)[0] * len(TEMPLATES))]
            about = {
                "caption": captions,
                "label": groups.index(emoji.group),
                "group": emoji.group,
                "subgroup": emoji.subgroup,
                "name": emoji.name,
                "codepoints": emoji.key,
                "block": next(block for first, last, block in blocks if first <= emoji.codepoints[0] <= last),
                "license": "picture: SIL OFL 1.1 (Noto Color Emoji); text: Unicode licence (CLDR)",
            }
            text = json.dumps(about, ensure_ascii=False)
            parts = {"jpg": pictures[emoji], "json": text.encode(), "txt": template.format(captions[0]).encode()}
            samples.append((emoji.key, parts))
        shards.write(str(out / name), samples)


def choose(emojis: list[Emoji], seed: int) -> list[Emoji]:
    """A pseudo-random part of every group of MOST and all of the others, in pseudo-random order."""
    groups: dict[str, list[Emoji]] = {}
    for emoji in sorted(emojis, key=lambda emoji: uniforms(seed, "emoji-choice", emoji.key, 0, 1)[0]):
        groups.setdefault(emoji.group, []).append(emoji)
    chosen = [emoji for group, members in groups.items() for emoji in members[: MOST.get(group)]]
    return sorted(chosen, key=lambda emoji: uniforms(seed, "emoji-order", emoji.key, 0, 1)[0])


def draw(font: Path, emojis: Iterable[Emoji]) -> dict[Emoji, bytes]:
    """JPEGs of SIDE_PX on white. Of emoji that look the same (some flags) only the first is drawn."""
    face = TTFont(font)
    glyphs, strike = face.getBestCmap(), face["CBDT"].strikeData[0]
    ligatures = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in face["GSUB"].table.LookupList.Lookup
        if lookup.LookupType == 4
        for table in lookup.SubTable
        for first, entries in table.ligatures.items()
        for ligature in entries
    }
    seen: set[bytes] = set()
    pictures = {}
    for emoji in emojis:
        names = tuple(glyphs.get(point, "") for point in emoji.codepoints)
        glyph = strike.get(names[0] if len(names) == 1 else ligatures.get(names, ""))
        digest = hashlib.sha256(glyph.imageData).digest() if glyph else b""
        if not glyph or digest in seen:
            continue
        seen.add(digest)
        bitmap = Image.open(io.BytesIO(glyph.imageData)).convert("RGBA")
        side = max(bitmap.size)
        canvas = Image.new("RGBA", (side, side), "white")
        canvas.alpha_composite(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
        jpeg = io.BytesIO()
        resized = canvas.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
        resized.save(jpeg, "JPEG", quality=90, optimize=True)
        pictures[emoji] = jpeg.getvalue()
    return pictures


def describe(emoji: Emoji, keywords: list[str]) -> list[str]:
    """Captions of an emoji: a phrase, the phrase with the kind of thing, the keywords (the newest have none)."""
    name = re.sub("[.!“”]", "", emoji.name).replace("’", "'")  # a full stop ends a caption, and '!' is token 0
    what, _, detail = name.partition(": ")
    *most, last = detail.split(", ")
    details = f"{', '.join(most)} and {last}" if most else last
    if emoji.subgroup == "country-flag" or what == "flag":
        phrase = f"the flag of {detail}"
    elif emoji.subgroup == "time" and ("o'clock" in name or "thirty" in name):
        phrase = f"a clock showing {name}"
    elif what == "keycap":
        phrase = f"the keycap {detail}"
    else:
        joint = " of " if emoji.subgroup == "family" and "skin" not in detail else " with "
        phrase = _article(what) + what + (joint + details if detail else "")
    kind = [f"{phrase}, {KINDS[emoji.subgroup]}"] if emoji.subgroup in KINDS else []
    return [phrase, *kind, *([", ".join(keywords)] if keywords else [])]


def read_names(root: Path) -> Iterator[Emoji]:
    """Fully-qualified emoji of emoji-test.txt in its order; of those with skin tones, the ones with a single tone."""
    group = subgroup = ""
    for line in (root / UNICODE / "emoji/emoji-test.txt").read_text("utf-8").splitlines():
        if heading := re.match("# (group|subgroup): (.*)", line):
            group, subgroup = (heading[2], "") if heading[1] == "group" else (group, heading[2])
        elif entry := re.match(r"([0-9A-F ]+); fully-qualified +# \S+ E[\d.]+ (.*)", line):
            points = tuple(p for p in (int(h, 16) for h in entry[1].split()) if p != PRESENTATION)
            if sum(point in SKIN_TONES for point in points) <= 1:
                yield Emoji(points, entry[2], group, subgroup)


def read_keywords(root: Path) -> dict[tuple[int, ...], list[str]]:
    """CLDR's English keywords, by code points."""
    keywords = {}
    for folder in ("annotations", "annotationsDerived"):
        for node in ElementTree.parse(root / UNICODE / f"cldr/common/{folder}/en.xml").iter("annotation"):
            if "type" not in node.attrib and node.text:
                points = tuple(ord(c) for c in node.attrib["cp"] if ord(c) != PRESENTATION)
                keywords[points] = [re.sub("[.!“”]", "", word).replace("’", "'") for word in node.text.split(" | ")]
    return keywords


def read_blocks(root: Path) -> list[tuple[int, int, str]]:
    """Unicode blocks as (first, last, name)."""
    text = (root / UNICODE / "Blocks.txt").read_text("utf-8")
    return [(int(a, 16), int(b, 16), name) for a, b, name in re.findall(r"^(\w+)\.\.(\w+); (.*)$", text, re.MULTILINE)]


def _article(what: str) -> str:
    proper = what[0].isupper() and not what.split()[0].isupper()
    head = re.split(r" (?:with|in|on|of|for|\w+ing) ", what)[0]
    plural = re.search(r"[^suo]s$|^(?:men|women|people|children|thumbs|palms)\b", head)
    if proper or plural or head.split()[-1] in NO_ARTICLE:
        return ""
    return "an " if re.match("[aeio]|hour|u[mnp](?!i)", what.lower()) else "a "

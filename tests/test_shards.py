import random
import tarfile
from pathlib import Path

import fsspec
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.config import CaptionFiles
from reinforce.data.images import decode
from reinforce.data.shards import Place, Sample, Shard, expand, joined, locate, read, read_parts, write
from reinforce.data.status import Status
from reinforce.errors import ConfigError, MissingExtra, SampleError, ShardError
from tests.broken import Expected, all_tars, make, members, tar
from tests.odd import ARITHMETIC_JPEG, odd_captions

# pytest replaces the filters of the process, and with them the one that `reinforce.data.images` sets
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

TARS = all_tars()


def status_of(sample: Sample) -> Status:
    """With the image decoded, as a run does it."""
    if sample.status == Status.GOOD:
        try:
            decode(sample.image)
        except SampleError as error:
            return Status(error.status)
    return sample.status


def samples_of(data: bytes) -> list[Sample]:
    fsspec.filesystem("memory").pipe("/bucket/00000.tar", data)
    return list(read(Shard("00000", "memory://bucket/00000.tar")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    assert make(folder) == {name: expected for name, (_, expected) in TARS.items()}
    return folder


@pytest.mark.parametrize("name", TARS)
def test_what_comes_of_a_broken_or_odd_tar(name: str, folder: Path) -> None:
    found, error, url = [], "", str(folder / name)
    try:
        for sample in read(Shard(name, url)):
            found.append((sample.key, status_of(sample)))
            assert bool(sample.detail) == (sample.status != Status.GOOD)
            assert sample.status == Status.GOOD or (sample.image, sample.captions) == (b"", ())
    except ShardError as fault:
        error = str(fault)
    expected = TARS[name][1]
    assert Expected(tuple(found), expected.error) == expected
    if expected.error:
        assert error.startswith(f"{url}: ") and expected.error in error and "fetch or write it again" in error
    else:
        assert not error


def test_at_least_sixty_cases() -> None:
    assert sum(max(1, len(expected.samples)) for _, expected in TARS.values()) >= 60


@pytest.mark.parametrize("key", odd_captions())
def test_captions(key: str) -> None:
    parts, status, captions = odd_captions()[key]
    [sample] = samples_of(tar(*members(key, jpg=ARITHMETIC_JPEG, **parts)))
    assert (sample.key, sample.status, sample.captions) == (key, status, captions)
    assert status == Status.GOOD or key in sample.detail


@pytest.mark.parametrize(
    "files, parts, captions",
    [
        (CaptionFiles(lines=True), {"txt": b"one\r\n two\tthree \n\none"}, ("one", "two three")),
        (CaptionFiles(lines=True), {"txt": b"one\ntwo", "json": b'{"caption": "a\\nb"}'}, ("one", "two", "a b")),
        (
            CaptionFiles(keys=("re", "org")),
            {"json": b'{"org": "b", "re": ["a", "c"], "caption": "d"}'},
            ("a", "c", "b"),
        ),
        (CaptionFiles(keys=("re",)), {"json": b'["a"]'}, ("a",)),
    ],
)
def test_captions_by_line_and_under_other_keys(
    files: CaptionFiles, parts: dict[str, bytes], captions: tuple[str, ...]
) -> None:
    fsspec.filesystem("memory").pipe("/bucket/0.tar", tar(*members("a", jpg=ARITHMETIC_JPEG, **parts)))
    [sample] = read(Shard("0", "memory://bucket/0.tar"), files)
    assert sample.captions == captions


def test_a_hard_link_has_the_bytes_and_the_place_of_its_file(folder: Path) -> None:
    """Whether the tar is streamed or its members are looked up."""
    path = str(folder / "hard_links.tar")
    samples = list(read(Shard("0", path)))
    assert [sample.image for sample in samples[:2]] == [ARITHMETIC_JPEG] * 2
    assert samples[0].offset == samples[1].offset > 0
    places = locate(path)
    assert places[1] == Place("b", places[0].offset, len(ARITHMETIC_JPEG))
    assert [place.key for place in places] == [sample.key for sample in samples]


@pytest.mark.parametrize("name", TARS)
def test_places_are_those_of_the_samples(name: str, folder: Path) -> None:
    if not TARS[name][1].error:
        samples = list(read(Shard(name, str(folder / name))))
        places = locate(str(folder / name))
        assert [place.key for place in places] == [sample.key for sample in samples]
        good = [(s.offset, p.offset) for s, p in zip(samples, places, strict=True) if s.status == Status.GOOD]
        assert all(read_at == located for read_at, located in good)


def test_the_first_of_two_samples_of_one_key_stays_whole() -> None:
    first, second = samples_of(tar(("a.jpg", b"1"), ("a.jpg", b"2"), ("a.txt", b"one")))
    assert (first.image, first.captions, second.status) == (b"1", ("one",), Status.DUPLICATE_KEY)


def test_status_numbers_are_part_of_the_format() -> None:
    assert {status.reason: int(status) for status in Status} == {
        "good": 0,
        "duplicate_key": 1,
        "missing_image": 2,
        "empty_image": 3,
        "unknown_image_format": 4,
        "truncated_image": 5,
        "broken_image": 6,
        "too_many_pixels": 7,
        "missing_caption": 8,
        "empty_caption": 9,
        "caption_not_utf8": 10,
        "caption_not_text": 11,
        "caption_json_broken": 12,
        "no_record": 13,
        "other_size": 14,
        "file_too_large": 15,
    }


def test_files_that_are_too_large_are_not_read() -> None:
    large, json = b"a" * ((1 << 20) + 1), b'{"caption": "a dog", "more": "' + b"a" * (1 << 20) + b'"}'
    picture = bytes((64 << 20) + 1)
    found = samples_of(
        tar(
            *members("picture", jpg=picture, txt=b"a dog"),
            *members("txt", jpg=ARITHMETIC_JPEG, txt=large),
            *members("json", jpg=ARITHMETIC_JPEG, json=json),
            *members("json_empty_txt", jpg=ARITHMETIC_JPEG, json=json, txt=b" "),
            *members("json_and_txt", jpg=ARITHMETIC_JPEG, json=json, txt=b"a dog"),
            *members("largest", jpg=ARITHMETIC_JPEG, txt=large[1:]),
        )
    )
    large_ones = dict.fromkeys(["picture", "txt", "json", "json_empty_txt"], Status.FILE_TOO_LARGE)
    assert {s.key: s.status for s in found} == large_ones | {"json_and_txt": Status.GOOD, "largest": Status.GOOD}
    assert found[0].detail == "picture.jpg: has 67108865 bytes, and at most 67108864 are read; shrink it"


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_header_that_would_fill_the_memory_is_not_read(format: int) -> None:
    with pytest.raises(ShardError, match="another field of a header has 20000.. bytes"):
        samples_of(tar(("a" * 2_000_000 + ".jpg", b"1"), format=format))


def test_a_sample_comes_out_before_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    path.write_bytes(tar(*(m for i in range(100) for m in members(f"{i}", jpg=bytes(10_000), txt=b"a")))[:60_000])
    samples = read(Shard("00000", str(path)))
    assert next(samples).key == "0"
    with pytest.raises(ShardError, match="unexpected end of data"):
        list(samples)


@pytest.mark.parametrize("url", ["{tmp}/missing.tar", "{tmp}", "memory://nowhere/missing.tar"])
def test_a_tar_that_cannot_be_opened(url: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="cannot be read"):
        list(read(Shard("missing", url.format(tmp=tmp_path))))


# Names, captions and bytes of any kind, but for what no tar and no text file can hold.
segment = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/."), min_size=1, max_size=12)
keys = st.lists(segment, min_size=1, max_size=3).map("/".join).filter(lambda key: "__" not in key)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(lambda text: text.split())
datasets = st.dictionaries(keys, st.tuples(st.sampled_from(["jpg", "jpeg", "png", "webp"]), st.binary(), texts))


@given(datasets)
@settings(deadline=None, max_examples=50)
def test_what_is_written_is_read(dataset: dict[str, tuple[str, bytes, str]]) -> None:
    files = [(key, {extension: image, "txt": text.encode()}) for key, (extension, image, text) in dataset.items()]
    paths = ["memory://one/00000.tar", "memory://two/00000.tar"]
    for path in paths:
        write(path, files)
    one, two = fsspec.filesystem("memory").cat(paths).values()
    assert one == two
    found = list(read(Shard("00000", paths[0])))
    captions = {key: " ".join(text.removeprefix("\ufeff").split()) for key, (_, _, text) in dataset.items()}
    assert [(s.key, s.image, s.captions) for s in found if s.status == Status.GOOD] == [
        (key, image, (captions[key],)) for key, (_, image, _) in dataset.items() if captions[key]
    ]
    assert [s.key for s in found] == list(dataset)


@given(datasets)
@settings(deadline=None, max_examples=30)
def test_groups_are_those_of_webdataset(dataset: dict[str, tuple[str, bytes, str]]) -> None:
    # webdataset does not know a folder with a line break in its name
    files = {key.replace("\n", "_"): sample for key, sample in dataset.items()}
    write("memory://wds/00000.tar", ((key, {ext: image, "txt": b"a"}) for key, (ext, image, _) in files.items()))
    source = {"url": "00000.tar", "stream": fsspec.open("memory://wds/00000.tar").open()}
    theirs = webdataset.tariterators.group_by_keys(webdataset.tariterators.tar_file_expander([source]))
    assert [(s["__key__"], next(s[ext] for ext in s if ext in ("jpg", "jpeg", "png", "webp"))) for s in theirs] == [
        (s.key, s.image) for s in read(Shard("00000", "memory://wds/00000.tar"))
    ]


@pytest.mark.parametrize("name", ["names", "long_names_pax", "long_names_gnu", "upper_case", "ustar", "caption_first"])
def test_keys_of_odd_names_are_those_of_webdataset(name: str, folder: Path) -> None:
    theirs = webdataset.WebDataset(str(folder / f"{name}.tar"), shardshuffle=False)
    assert [s["__key__"] for s in theirs] == [s.key for s in read(Shard(name, str(folder / f"{name}.tar")))]


def test_a_tar_that_webdataset_wrote(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as sink:
        for i in range(3):
            sink.write({"__key__": f"sample{i}", "jpg": bytes([i]), "txt": f"caption {i}", "json": {"url": i}})
    samples = list(read(Shard("00000", str(tmp_path / "00000.tar"))))
    assert samples == [Sample(f"sample{i}", bytes([i]), (f"caption {i}",)) for i in range(3)]


def test_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    path = str(tmp_path / "00000.tar")
    write(path, [("a/1", {"jpg": b"1", "txt": b"one"}), ("2", {"png": b"2", "json": b"{}"})])
    theirs = [
        {k: v for k, v in s.items() if k in ("__key__", "jpg", "png", "txt", "json")}
        for s in webdataset.WebDataset(path, shardshuffle=False)
    ]
    assert theirs == [{"__key__": "a/1", "jpg": b"1", "txt": b"one"}, {"__key__": "2", "png": b"2", "json": b"{}"}]
    with tarfile.open(path) as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in archive} == {(0, 0, 0, "", "")}


@pytest.mark.parametrize(
    "name", ["a.b.jpg", ".jpg", ".a.jpg", "a/.jpg", "a\0b.jpg", "__MACOSX/a.jpg", "__x__/a.jpg", "a.JPG", "a.x/y"]
)
def test_a_name_that_would_not_come_back_is_refused(name: str, tmp_path: Path) -> None:
    key, _, extension = name.rpartition(".")
    with pytest.raises(ConfigError, match="would not be read"):
        write(str(tmp_path / "00000.tar"), [(key, {extension: b""})])


def test_damage_of_any_kind_is_a_shard_error_or_a_status() -> None:
    rng = random.Random(0)
    wholes = [data for data, expected in TARS.values() if len(data) < 50_000 and not expected.error]
    statuses, errors = set(), set()
    for _ in range(300):
        data = bytearray(rng.choice(wholes))
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.choice([1, 1, 4]) if data else 0):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            for sample in samples_of(bytes(data)):
                statuses.add(status_of(sample))
                sample.key.encode()
        except ShardError as error:
            errors.add(str(error))
    assert len(statuses) > 3 and len(errors) > 3


@pytest.fixture
def tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.tar", "a.tar", "00009.tar", "00010.tar", "more/a.tar", "more/[1].tar", "more/notes.txt", "d.tar/x"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "patterns, names",
    [
        ("{00009..00010}.tar", ["00009.tar", "00010.tar"]),
        ("{b,a}.tar", ["b.tar", "a.tar"]),
        ("0*.tar", ["00009.tar", "00010.tar"]),
        ("b.tar::*0.tar::file://{tmp}/more/a.tar", ["b.tar", "00010.tar", "more/a.tar"]),
        ("more/[1].tar", ["more/[1].tar"]),
        ("{a,more/*1]}.tar", ["a.tar", "more/[1].tar"]),
    ],
)
def test_expand_local(patterns: str, names: list[str], tars: Path) -> None:
    found = expand(patterns.replace("{tmp}", str(tars)))
    assert found == [Shard(Path(name).stem, f"{tars}/{name}") for name in names]


def test_expand_remote_by_star() -> None:
    for name in ("2", "10", "1"):
        write(f"memory://expand/{name}.tar", [(name, {"jpg": b"", "txt": b"a"})])
    shards = expand("memory://expand/*.tar")
    assert [shard.name for shard in shards] == ["1", "10", "2"]
    assert [sample.key for shard in shards for sample in read(shard)] == ["1", "10", "2"]


def test_expand_does_not_look_for_remote_files(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")

    def connect(*_: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr("socket.socket.connect", connect)
    assert expand("s3://bucket/train/{8..9}.tar") == [Shard(f"{i}", f"s3://bucket/train/{i}.tar") for i in (8, 9)]


@pytest.mark.parametrize(
    "patterns, words",
    [
        ("", "empty pattern"),
        ("a.tar::", "empty pattern"),
        ("missing.tar", "missing.tar: names no file"),
        ("{00009..00011}.tar", "00011.tar: names no file"),
        ("z*.tar", r"z\*.tar: names no file"),
        ("memory://nowhere/*.tar", "names no file"),
        (
            "d.tar",
            r"d.tar is a folder; a shard is a tar: write .d.tar/\*.tar', or .*: clip-reinforce pack d.tar -o DIR",
        ),
        ("more/*", "notes.txt: a shard is a file NAME.tar"),
        ("s3://bucket/train", "a shard is a file NAME.tar"),
        ("s3://bucket/.tar", "a shard is a file NAME.tar"),
        ("s3://bucket/__a.tar", "a shard is a file NAME.tar"),
        ("s3://bucket/zarr.json.tar", "a shard is a file NAME.tar, .* and not 'zarr.json'"),
        (
            "{0..99999999999}.tar",
            "names 100,000,000,000 tars, and at most 10,000,000 are taken",
        ),
        ("s3://b/{0..9999}/{0..9999}.tar", "names 100,000,000 tars"),
        ("a.tar::more/a.tar", "{tmp}/a.tar and {tmp}/more/a.tar are both named 'a'"),
        ("a.tar::./a.tar", "both named 'a'"),
        ("{a,b.tar", "write braces as"),
        ("nosuch://bucket/a.tar", "no file system is called 'nosuch'"),
    ],
)
def test_expand_refuses(patterns: str, words: str, tars: Path) -> None:
    with pytest.raises(ConfigError, match=words.replace("{tmp}", str(tars))):
        expand(patterns)


def test_patterns_may_come_in_a_list(tars: Path) -> None:
    assert joined("a.tar::b.tar") == joined(["a.tar", Path("b.tar")]) == "a.tar::b.tar"
    assert joined(tars / "a.tar") == str(tars / "a.tar")


def test_expand_names_the_package_that_is_missing() -> None:
    with pytest.raises(MissingExtra, match="dropbox"):
        expand("dropbox://folder/a.tar")


def test_parts_are_those_asked_for_a_copy_for_each_time_that_a_name_comes_again(tmp_path: Path) -> None:
    path = str(tmp_path / "0.tar")
    write(path, [("a", {"jpg": b"1", "cls": b"7", "npy": b"2"}), ("b", {"cls": b"8"}), ("b", {"cls": b"9"})])
    parts = list(read_parts(Shard("0", path), ("jpg", "cls")))
    assert parts == [("a", {"jpg": b"1", "cls": b"7", "npy": b""}), ("b", {"cls": b"8"}), ("b", {"cls": b"9"})]

"""Archives, pickles and images that were changed: used, or refused in one sentence; nothing in them
runs, and nothing lies outside its folder."""

import gzip
import io
import os
import pickle
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile import changed_bytes, few
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_files import batch, config, dumps, refusal, write_image

from dbdist.data import load_dataset
from dbdist.data.files import unpack
from dbdist.data.readers import _walk
from dbdist.errors import DataError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """A working directory in which no payload makes its file."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("canary").exists()


def assert_one_sentence(error):
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


# -- pickles ---------------------------------------------------------------------------------------


class Runs:
    """A pickle of this calls function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PAYLOADS = (
    b"cposix\nsystem\n(S'touch canary'\ntR",
    b'cbuiltins\neval\n(S\'open("canary", "w")\'\ntR',
    b"(S'touch canary'\nios\nsystem\n",
    b"(cos\nsystem\nS'touch canary'\no",
    b"\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R",
    b"cnumpy\nndarray\n",
    b"c_codecs\nencode\n(Vx\nVrot13\ntR",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"\x96" + (2**40).to_bytes(8, "little"),
    b"r\xff\xff\xff\x7f",
    b"\x8e" + (2**60).to_bytes(8, "little"),
    b"b",
    b"\x81",
    b"2",
    b"0",
    b"\x94",
    b"}",
    b"]",
    b")",
    b"\x82\x01",
    b"Pid\n",
)


@pytest.mark.parametrize("protocol", ["python2", 2, 5])
@few
@given(data=st.data())
def test_a_changed_pickle_is_read_or_refused(tmp_path, protocol, data):
    content = dumps(batch(3, "fine_labels", 100), protocol)
    try:
        _walk(tmp_path / "train", data.draw(changed_bytes(content, PAYLOADS)))
    except DataError as error:
        assert_one_sentence(error)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    "payload",
    [
        Runs(os.system, "touch canary"),
        Runs(eval, "open('canary', 'w')"),
        Runs(getattr, "x", "join"),
        Runs(np.ndarray, (2**40,), "O"),
        Runs(np.dtype, "O"),
        Runs(memoryview, b"x"),
    ],
    ids=lambda payload: payload.call[0].__name__,
)
def test_a_pickle_calls_nothing(tmp_path, payload):
    for entry in ({"data": payload}, {"labels": [payload]}, payload):
        with pytest.raises(DataError):
            raise_if_held(_walk(tmp_path / "train", pickle.dumps(entry, 4)))
    assert not Path("canary").exists()


def raise_if_held(entry):
    """A description of an array of objects may be read: it holds none."""
    held = [*entry.values(), *entry.get("labels", ())]
    if all(type(value).__module__ in ("builtins", "dbdist.data.readers") for value in held):
        raise DataError("nothing but a description")


def test_arrays_of_both_orders_are_read_as_numpy_reads_them(tmp_path):
    for array in (
        np.arange(12, dtype=np.uint8).reshape(3, 4),
        np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4)),
    ):
        for protocol in (2, 3, 4, 5):
            entry = _walk(tmp_path, pickle.dumps({"data": array}, protocol))
            assert entry["data"].pixels().tolist() == array.tolist()


def test_an_array_that_lies_about_its_size_is_refused(tmp_path):
    content = pickle.dumps({"data": np.zeros((2, 3), np.uint8)}, 2)
    for shape in (b"M\xff\xff", b"J\xff\xff\xff\xff"):
        with pytest.raises(DataError, match="damaged"):
            _walk(tmp_path, content.replace(b"K\x02K\x03\x86", shape + b"K\x03\x86"))


# -- images ----------------------------------------------------------------------------------------


def encoded(kind):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    written = io.BytesIO()
    image.save(written, kind)
    return written.getvalue()


ENCODED = {kind: encoded(kind) for kind in ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for path in ("train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "val/dog/a.png"):
        write_image(root / path)
    return root


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ENCODED)
@settings(few, max_examples=40)
@given(data=st.data())
def test_a_changed_image_is_read_or_refused(folder, kind, data):
    (folder / "train/cat/a.png").write_bytes(data.draw(changed_bytes(ENCODED[kind])))
    train = load_dataset(config("image_folder", folder, image_size=16), "train")
    try:
        image = train[0]["image"]
        assert image.shape == (3, 16, 16)
    except DataError as error:
        assert_one_sentence(error)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 12_000), (1, 200_000), (200_000, 1)])
def test_an_image_too_large_or_too_narrow_is_refused_at_once(folder, size):
    content = bytearray(ENCODED["PNG"])
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (folder / "train/cat/a.png").write_bytes(content)
    train = load_dataset(config("image_folder", folder), "train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"train/cat/a\.png (has|is not a readable).*pixels"):
            train[0]


def test_formats_that_start_other_programs_are_not_read(folder):
    """PIL hands PostScript to Ghostscript."""
    written = io.BytesIO()
    Image.new("RGB", (8, 8)).save(written, "EPS")
    (folder / "train/cat/a.png").write_bytes(written.getvalue())
    with pytest.raises(DataError, match="not a readable image"):
        load_dataset(config("image_folder", folder), "train")[0]


def test_a_pipe_in_place_of_an_image_is_not_waited_for(folder):
    path = folder / "train/cat/a.png"
    path.unlink()
    os.mkfifo(path)
    train = load_dataset(config("image_folder", folder), "train")
    with pytest.raises(DataError, match="missing"):
        train[0]
    path.unlink()


@settings(few, max_examples=40)
@given(data=st.data())
def test_changed_annotations_are_used_or_refused(folder, data):
    write_image(folder / "val/images/v.png")
    lines = b"v.png\tcat\t0\t0\nv.png\tdog\t1\t1\n"
    content = data.draw(changed_bytes(lines, (b"../x", b"/etc/passwd", b"\xff", b"\n\t\n", b"\0")))
    (folder / "val/val_annotations.txt").write_bytes(content)
    try:
        load_dataset(config("image_folder", folder), "test")
    except DataError as error:
        assert_one_sentence(error)
    finally:
        (folder / "val/val_annotations.txt").unlink()


def test_annotations_that_are_no_text_are_refused(folder):
    (folder / "val/val_annotations.txt").write_bytes(b"\xff\xfe\x00")
    assert "val_annotations.txt cannot be read" in refusal(config("image_folder", folder), "test")
    (folder / "val/val_annotations.txt").unlink()


# -- archives --------------------------------------------------------------------------------------


def tar_of(path, *members):
    """members: (name, kind, content or target)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname, content = content, b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def zip_of(path, *members):
    """members: (name, mode, content)."""
    with zipfile.ZipFile(path, "w") as opened:
        for name, mode, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            opened.writestr(info, content)
    return path


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


GOOD = ("set/a", tarfile.REGTYPE, b"good")


@pytest.mark.parametrize(
    "members",
    [
        [("../evil", tarfile.REGTYPE, b"x")],
        [("set/../../evil", tarfile.REGTYPE, b"x")],
        [("{root}/evil", tarfile.REGTYPE, b"x")],
        [("set/link", tarfile.SYMTYPE, ".."), ("set/link/../evil", tarfile.REGTYPE, b"x")],
        [("set/link", tarfile.SYMTYPE, "{root}"), ("set/link/evil", tarfile.REGTYPE, b"x")],
        [("set/link", tarfile.SYMTYPE, "../../evil")],
        [("set/link", tarfile.LNKTYPE, "../secret")],
        [("set/dev", tarfile.CHRTYPE, b"")],
        [("set/dev", tarfile.BLKTYPE, b"")],
        [("set/pipe", tarfile.FIFOTYPE, b"")],
        [("../evil", tarfile.DIRTYPE, b"")],
    ],
    ids=str,
)
def test_a_tar_writes_nothing_outside_and_no_links(tmp_path, members):
    (tmp_path / "secret").write_text("old")
    named = [
        (name.format(root=tmp_path), kind, c.format(root=tmp_path) if isinstance(c, str) else c)
        for name, kind, c in members
    ]
    archive = tar_of(tmp_path / "x.tar.gz", GOOD, *named)
    (tmp_path / "into").mkdir()
    with pytest.raises(DataError, match="is refused") as caught:
        unpack(archive, tmp_path / "into")
    assert_one_sentence(caught.value)
    assert repr(named[0][0]) in str(caught.value)
    assert files_below(tmp_path) == ["into", "into/set", "into/set/a", "secret", "x.tar.gz"]
    assert (tmp_path / "secret").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("../evil", stat.S_IFREG),
        ("set/../../evil", 0),
        ("{root}/evil", stat.S_IFREG),
        ("set/link", stat.S_IFLNK | 0o777),
        ("set/dev", stat.S_IFCHR),
        ("set/pipe", stat.S_IFIFO),
        ("../evil/", stat.S_IFDIR),
    ],
)
def test_a_zip_writes_nothing_outside_and_no_links(tmp_path, name, mode):
    name = name.format(root=tmp_path)
    archive = zip_of(tmp_path / "x.zip", ("set/a", stat.S_IFREG, b"good"), (name, mode, b"../.."))
    (tmp_path / "into").mkdir()
    with pytest.raises(DataError, match="is refused"):
        unpack(archive, tmp_path / "into")
    assert files_below(tmp_path) == ["into", "into/set", "into/set/a", "x.zip"]


def test_archives_are_unpacked_with_plain_permissions(tmp_path):
    tar_of(tmp_path / "x.tar.gz", ("set", tarfile.DIRTYPE, b""), GOOD)
    zip_of(tmp_path / "x.zip", ("set/", stat.S_IFDIR, b""), ("set/a", 0o104777, b"good"))
    for name in ("x.tar.gz", "x.zip"):
        folder = tmp_path / f"into-{name}"
        folder.mkdir()
        unpack(tmp_path / name, folder)
        assert (folder / "set/a").read_bytes() == b"good"
        assert not (folder / "set/a").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)


@pytest.mark.parametrize("kind", ["x.tar.gz", "x.tar", "x.zip"])
@few
@given(data=st.data())
def test_a_changed_archive_is_unpacked_or_refused(tmp_path_factory, kind, data):
    root = tmp_path_factory.mktemp("archive")
    archive, into = root / kind, root / "into"
    into.mkdir()
    if kind == "x.zip":
        zip_of(archive, ("set/a", stat.S_IFREG, b"good" * 50), ("set/b", 0, b"x"))
    else:
        tar_of(archive, GOOD, ("set/b", tarfile.REGTYPE, b"x" * 600))
    content = archive.read_bytes()
    if kind == "x.tar":
        content = gzip.decompress(content)
    archive.write_bytes(
        data.draw(changed_bytes(content, (b"../evil", b"/", b"2", b"1", b"../" * 4)))
    )
    try:
        unpack(archive, into)
    except DataError as error:
        assert_one_sentence(error)
    assert {p.name for p in root.iterdir()} == {kind, "into"}
    assert not any(p.is_symlink() for p in into.rglob("*"))

"""Archives that were changed: unpacked, or refused in one sentence; nothing lies outside."""

import gzip
import io
import stat
import tarfile
import zipfile

import pytest
from data_files import assert_one_sentence
from hostile import changed_bytes, few
from hypothesis import given
from hypothesis import strategies as st

from dbdist.data.archives import unpack
from dbdist.errors import DataError


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
        [("set/link", tarfile.SYMTYPE, "{root}"), ("set/link/evil", tarfile.REGTYPE, b"x")],
        [("set/link", tarfile.SYMTYPE, "../../evil")],
        [("set/link", tarfile.LNKTYPE, "../secret")],
        [("set/dev", tarfile.CHRTYPE, b"")],
        [("set/pipe", tarfile.FIFOTYPE, b"")],
        [("../evil", tarfile.DIRTYPE, b"")],
    ],
    ids=str,
)
def test_a_tar_writes_nothing_outside(tmp_path, members):
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
    assert files_below(tmp_path) == ["into", "into/set", "into/set/a", "secret", "x.tar.gz"]
    assert (tmp_path / "secret").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("../evil", stat.S_IFREG),
        ("set/../../evil", 0),
        ("{root}/evil", stat.S_IFREG),
        ("set/link", stat.S_IFLNK | 0o777),
        ("../evil/", stat.S_IFDIR),
    ],
)
def test_a_zip_writes_nothing_outside_and_no_links(tmp_path, name, mode):
    name = name.format(root=tmp_path)
    archive = zip_of(tmp_path / "x.zip", ("set/a", stat.S_IFREG, b"good"), (name, mode, b"../.."))
    into = tmp_path / "into"
    into.mkdir()
    unpack(archive, into)
    assert {p.name for p in tmp_path.iterdir()} == {"into", "x.zip"}
    assert not any(p.is_symlink() for p in into.rglob("*"))


def test_archives_are_unpacked_without_odd_permissions(tmp_path):
    tar_of(tmp_path / "x.tar.gz", ("set", tarfile.DIRTYPE, b""), GOOD)
    zip_of(tmp_path / "x.zip", ("set/", stat.S_IFDIR, b""), ("set/a", 0o104777, b"good"))
    for name in ("x.tar.gz", "x.zip"):
        folder = tmp_path / f"into-{name}"
        folder.mkdir()
        unpack(tmp_path / name, folder)
        assert (folder / "set/a").read_bytes() == b"good"
        assert not (folder / "set/a").stat().st_mode & stat.S_ISUID


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

"""Writes are atomic and never replace silently."""

from pathlib import Path

import pytest

from sdbctl import files
from sdbctl.errors import BadInput, EnvironmentFailure, UsageError


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_write_and_read(tmp_path):
    path = files.write(tmp_path / "a", "text")
    assert files.read(path, "file") == b"text"
    assert names(tmp_path) == ["a"]


def test_existing_output_is_kept(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(UsageError, match="already exists; use --force"):
        files.write(path, "new", force=False)
    assert path.read_text() == "old"
    files.write(path, "new", force=True)
    assert path.read_text() == "new"


def test_a_failing_writer_leaves_nothing_and_keeps_the_old(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def full(part):
        part.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentFailure, match="No space left"):
        files.write(path, full)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_interrupted_writer_leaves_nothing(tmp_path):
    def stopped(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "a", stopped)
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk(tmp_path):
    def full(part):
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(EnvironmentFailure, match="No space left"):
        files.write(tmp_path / "a", full)
    assert names(tmp_path) == []


def test_claim_refuses_what_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        files.claim(tmp_path, force=True)
    with pytest.raises(EnvironmentFailure, match="does not exist"):
        files.claim(tmp_path / "no" / "a", force=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.touch(), "is empty"),
    ],
)
def test_read_says_what_is_wrong(tmp_path, make, message):
    path = tmp_path / "in"
    make(path)
    with pytest.raises(BadInput, match=message):
        files.read(path, "checkpoint")


def test_private_files_are_their_owners(tmp_path):
    assert files.write(tmp_path / "a", b"x", private=True).stat().st_mode & 0o777 == 0o600
    assert files.write(tmp_path / "b", b"x").stat().st_mode & 0o044 == 0o044


def test_one_process_holds_a_lock_file_which_then_goes(tmp_path):
    marker = tmp_path / "lock"
    with files.locked(marker, 0) as first:
        with files.locked(marker, 0) as second:
            assert (first, second) == (True, False)
        assert marker.exists()
    assert not marker.exists()


@pytest.mark.parametrize("error", [OSError("no locks here"), NotImplementedError()])
def test_a_disk_that_knows_no_locks_holds_nobody_up(error, tmp_path, monkeypatch):
    def refuse(self, **how):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with files.locked(tmp_path / "lock", 0) as free, files.alone(tmp_path / "out"):
        assert free
    with pytest.raises(OSError, match="mine"), files.locked(tmp_path / "lock"):
        raise OSError("mine")

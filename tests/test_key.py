"""The key: derivation is stable, the secret does not leak, and patterns are what they say."""

import copy
import hashlib
import io
import math
import os
import pickle
import stat
import traceback
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdbctl.errors import BadInput, EnvironmentFailure, UsageError
from sdbctl.key import Key, correlation, embed, near, wrong

SECRET = bytes(range(32))
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")


def test_derivation_is_stable():
    stream = hashlib.shake_256(b"sdbctl pattern v1" + b"2x3x4:" + SECRET).digest(72)
    drawn = [int.from_bytes(stream[i : i + 3], "big") for i in range(0, 72, 3)]
    expected = [(sorted(drawn).index(value) + 0.5) / 24 for value in drawn]
    pattern = Key(SECRET).pattern((2, 3, 4))
    assert pattern.shape == (2, 3, 4) and pattern.dtype == torch.float32
    assert pattern.flatten().tolist() == pytest.approx(expected)
    assert Key(SECRET).id == hashlib.shake_256(b"sdbctl key id v1" + SECRET).hexdigest(8)
    # written down, so that neither code nor test can drift
    assert Key(SECRET).id == "a5ef70f0bdd47a24"
    assert drawn[:2] == [10279983, 13302540]
    assert (pattern.flatten()[:6] * 24 - 0.5).round().int().tolist() == [13, 16, 4, 7, 12, 10]


def test_patterns_are_uniform_and_depend_on_key_and_shape():
    pattern = Key(SECRET).pattern((3, 64, 64))
    assert pattern.min() >= 0 and pattern.max() < 1
    assert abs(pattern.mean() - 0.5) < 0.01 and abs(pattern.std() - 12**-0.5) < 0.01
    # short ones as well: none is paler than another
    short = Key.generate().pattern((1, 8, 8)).flatten().sort().values
    assert torch.allclose(short, (torch.arange(64) + 0.5) / 64)
    assert abs(correlation(pattern, Key.generate().pattern((3, 64, 64)))) < 0.05
    assert not torch.equal(pattern.flatten()[:12], Key(SECRET).pattern((3, 2, 2)).flatten())


def test_the_secret_does_not_show():
    key = Key(SECRET)
    assert repr(key) == str(key) == f"<Key id={key.id}>"
    assert not hasattr(key, "__dict__")
    for leak in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            leak(key)
    with pytest.raises(TypeError) as caught:
        key.pattern((1, 2, "x"))
    text = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert repr(SECRET)[2:20] not in text and SECRET.hex() not in text


def test_save_and_load(tmp_path):
    path = tmp_path / "k.bin"
    key = Key.generate()
    key.save(path)
    assert path.stat().st_size == 32
    assert Key.load(path).id == key.id
    with pytest.raises(UsageError, match="already exists"):
        Key.generate().save(path)
    assert Key.load(path).id == key.id
    other = Key.generate()
    other.save(path, force=True)
    assert Key.load(path).id == other.id
    assert [file.name for file in tmp_path.iterdir()] == ["k.bin"]


@posix
def test_saved_keys_are_private_and_links_are_not_followed(tmp_path):
    path, victim = tmp_path / "k.bin", tmp_path / "victim"
    victim.write_text("kept")
    path.symlink_to(victim)
    with pytest.raises(UsageError):
        Key.generate().save(path)
    Key.generate().save(path, force=True)
    assert victim.read_text() == "kept" and not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_saving_where_it_cannot_be(tmp_path):
    with pytest.raises(EnvironmentFailure, match="cannot write key file"):
        Key.generate().save(tmp_path / "missing" / "k.bin")
    (tmp_path / "folder").mkdir()
    with pytest.raises(EnvironmentFailure, match="cannot write key file"):
        Key.generate().save(tmp_path / "folder", force=True)
    assert len(list(tmp_path.iterdir())) == 1


@posix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_files_that_others_can_read(tmp_path, mode):
    path = tmp_path / "k.bin"
    Key(SECRET).save(path)
    path.chmod(mode)
    with pytest.raises(BadInput, match="can be read by other users") as caught:
        Key.load(path)
    assert f"chmod 600 {path}" in caught.value.hint and "--insecure-key-file" in caught.value.hint
    with pytest.warns(UserWarning, match="other users"):
        assert Key.load(path, insecure=True).id == Key(SECRET).id


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "0 bytes"), (b"secretsecret", "12 bytes"), (SECRET + b"\n", "33 bytes"), (bytes(32), "constant")],
)
def test_what_is_no_key(tmp_path, content, message):
    path = tmp_path / "k.bin"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(BadInput, match=message) as caught:
        Key.load(path)
    assert "secretsecret" not in str(caught.value) and str(path) in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "k.bin", tmp_path):
        with pytest.raises(BadInput, match="cannot read key file"):
            Key.load(path)


def test_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(SECRET)))
    assert Key.load("-").id == Key(SECRET).id
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(SECRET * 2)))
    with pytest.raises(BadInput, match="at least 33 bytes"):
        Key.load("-")


def test_embed():
    x, pattern = torch.rand(5, 3, 4, 4), Key(SECRET).pattern((3, 4, 4))
    torch.testing.assert_close(embed(x, pattern, 0.9)[2], 0.9 * x[2] + 0.1 * pattern)
    assert torch.equal(embed(x, pattern, 1.0), x)


@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 1), st.integers(0, 2**31))
def test_near_has_the_correlation_asked_for(r, seed):
    pattern = Key(SECRET).pattern((3, 48, 48))
    other = near(pattern, r, torch.Generator().manual_seed(seed))
    assert other.shape == pattern.shape and other.min() >= 0 and other.max() < 1
    assert abs(other.mean() - 0.5) < 0.03 and abs(other.std() - 12**-0.5) < 0.02
    assert abs(correlation(pattern, other) - 6 / math.pi * math.asin(r / 2)) < 0.07


def test_near_at_its_ends():
    pattern = Key(SECRET).pattern((3, 16, 16))
    pattern[0, 0, 0] = 0
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(near(pattern, 1.0, generator), pattern, atol=1e-5, rtol=0)
    torch.testing.assert_close(near(pattern, -1.0, generator), 1 - pattern, atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="impossible"):
        near(pattern, 1.5, generator)
    assert abs(correlation(pattern, wrong(pattern, generator))) < 0.2
    assert wrong(pattern, None).shape == pattern.shape


def test_a_constant_pattern_is_correlated_with_nothing():
    pattern = Key.generate().pattern((3, 32, 32))
    assert correlation(torch.full_like(pattern, 0.1), pattern) == pytest.approx(0.0, abs=1e-6)
    assert correlation(pattern, 1 - pattern) == pytest.approx(-1.0)

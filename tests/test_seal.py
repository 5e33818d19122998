"""What is sealed: only key holders read it, and whatever was changed in it is noticed."""

import hashlib
import json

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from sdbctl.errors import BadInput
from sdbctl.key import Key
from sdbctl.seal import readers, seal, unseal

SECRET = bytes(range(32))


def test_another_program_can_read_it():
    from base64 import b64decode

    text = json.loads(seal(b"weights", [Key(SECRET)]))
    own, content = b64decode(text["keys"]["a5ef70f0bdd47a24"]), b64decode(text["content"])
    wrapping = AESGCM(hashlib.shake_256(b"sdbctl seal v1" + SECRET).digest(32))
    inner = AESGCM(wrapping.decrypt(own[:12], own[12:], b""))
    assert inner.decrypt(content[:12], content[12:], b"") == b"weights"


@given(st.binary(max_size=300), st.integers(1, 3))
def test_each_partner_reads_it_and_nobody_else(content, partners):
    keys = [Key.generate() for _ in range(partners)]
    text = seal(content, keys)
    assert all(unseal(text, key, "box") == content for key in keys)
    assert readers(text, "box") == tuple(sorted(key.id for key in keys))
    with pytest.raises(BadInput, match="not for the key"):
        unseal(text, Key.generate(), "box")
    assert seal(content, keys) != text


def test_who_forges_the_key_id_reads_nothing():
    text = json.loads(seal(b"weights", [Key(SECRET)]))
    thief = Key.generate()
    text["keys"] = {thief.id: next(iter(text["keys"].values()))}
    with pytest.raises(BadInput, match="was changed or is damaged"):
        unseal(json.dumps(text), thief, "box")


@given(st.data())
def test_a_changed_seal_is_refused(data):
    key = Key(SECRET)
    text = seal(b"some weights", [key])
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from('A0z+"}{ ').filter(lambda letter: letter != text[place]))
    changed = text[:place] + other + text[place + 1 :]
    try:
        found = unseal(changed, key, "box")
    except BadInput as error:
        assert "sealed in box" in error.message
    else:
        # spaces between the parts, and the last bits of base64, say nothing
        assert found == b"some weights"


@given(
    st.text()
    | st.from_regex(r'\{"version": ?\d+, "keys": .*\}')
    | st.recursive(st.none() | st.text(), st.lists).map(json.dumps)
)
def test_whatever_else_is_there_gets_one_line(text):
    with pytest.raises(BadInput, match="sealed in box"):
        unseal(text, Key(SECRET), "box")


def test_a_newer_version_says_so():
    text = json.loads(seal(b"x", [Key(SECRET)])) | {"version": 2}
    with pytest.raises(BadInput, match="another version"):
        unseal(json.dumps(text), Key(SECRET), "box")

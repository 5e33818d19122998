"""What is sealed: only key holders read it, and whatever was changed in it is noticed."""

import hashlib
import json
from base64 import b64decode

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from sdbctl.errors import BadInput
from sdbctl.key import Key
from sdbctl.seal import readers, seal, unseal

SECRET = bytes(range(32))


def test_another_program_can_read_it():
    text = json.loads(seal([b"weights"], [Key(SECRET)], "a b"))
    content = b64decode(text["keys"]["a5ef70f0bdd47a24"][0])
    cipher = AESGCM(hashlib.shake_256(b"sdbctl seal v1" + SECRET).digest(32))
    assert cipher.decrypt(content[:12], content[12:], b"a b 1/1") == b"weights"


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=3), st.integers(1, 3))
def test_each_partner_reads_it_and_nobody_else(contents, partners):
    keys = [Key.generate() for _ in range(partners)]
    text = seal(contents, keys, "x")
    assert all(unseal(text, key, "x", "box") == contents for key in keys)
    assert readers(text, "box") == tuple(sorted(key.id for key in keys))
    with pytest.raises(BadInput, match="nothing is sealed in box for the key"):
        unseal(text, Key.generate(), "x", "box")
    assert seal(contents, keys, "x") != text


def test_neither_partners_nor_thieves_can_change_it():
    mine, other = Key(SECRET), Key.generate()
    text = seal([b"weights", b"others"], [mine, other], "x")
    own = json.loads(text)["keys"]
    fake = json.loads(seal([b"fake"], [other], "x"))["keys"][other.id]
    for forged in (own[other.id], fake, own[mine.id][::-1], own[mine.id][:1]):
        with pytest.raises(BadInput, match="was changed, is damaged"):
            unseal(json.dumps({"version": 1, "keys": {mine.id: forged}}), mine, "x", "box")
    with pytest.raises(BadInput, match="belongs to another box"):
        unseal(text, mine, "y", "box")


@given(st.data())
def test_a_changed_seal_is_refused(data):
    key = Key(SECRET)
    text = seal([b"some weights"], [key], "x")
    place = data.draw(st.integers(0, len(text) - 1))
    # what is drawn must not depend on the text, whose nonce is another each time
    letters = data.draw(st.permutations('A0z+"}{ '))
    other = next(letter for letter in letters if letter != text[place])
    try:
        found = unseal(text[:place] + other + text[place + 1 :], key, "x", "box")
    except BadInput as error:
        assert "sealed in box" in error.message
    else:
        # spaces between the parts, and the last bits of base64, say nothing
        assert found == [b"some weights"]


ANYTHING = st.lists(st.text()) | st.text()


@given(
    st.text()
    | st.from_regex(r'\{"version": ?\d+, "keys": .*\}')
    | st.recursive(st.none() | st.text(), st.lists).map(json.dumps)
    | st.dictionaries(st.just(Key(SECRET).id), ANYTHING).map(lambda keys: json.dumps({"version": 1, "keys": keys}))
)
def test_whatever_else_is_there_gets_one_line(text):
    with pytest.raises(BadInput, match="sealed in box"):
        unseal(text, Key(SECRET), "x", "box")


def test_a_newer_version_says_so():
    text = json.loads(seal([b"x"], [Key(SECRET)], "x")) | {"version": 2}
    with pytest.raises(BadInput, match="another version"):
        unseal(json.dumps(text), Key(SECRET), "x", "box")

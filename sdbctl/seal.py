"""Bytes that only key holders can read, for what a file should give to nobody else.

The secret of a box has two uses. A pattern derived from it is mixed into the images that an API is asked about, and
whoever overhears enough of that knows the pattern. What is sealed is encrypted under another key derived from it, of
which no pattern, answer or fingerprint tells anything.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag

from sdbctl.errors import BadInput
from sdbctl.key import Key

VERSION = 1
MOST_KEYS = 50
"""Keys of one file: what is sealed stands in its header, which may have 100 MB."""
_NONCE = 12


def seal(contents: Sequence[bytes], keys: Sequence[Key], owner: str) -> str:
    """Encrypt for the holders of any of some keys, for each of them anew, so that none can change it for the others.

    AES-256-GCM (NIST SP 800-38D).

    Args:
        contents: What to hide, in order.
        keys: Who may read it.
        owner: What it belongs to, which is authenticated with it.

    Returns:
        JSON with the version and, by key id, a list of nonces and ciphertexts in base64.
    """

    def encrypt(key: Key, content: bytes, index: int) -> str:
        nonce = os.urandom(_NONCE)
        return base64.b64encode(nonce + key.cipher.encrypt(nonce, content, _bound(owner, index, contents))).decode()

    sealed = {key.id: [encrypt(key, content, index) for index, content in enumerate(contents)] for key in keys}
    return json.dumps({"version": VERSION, "keys": sealed}, sort_keys=True)


def unseal(text: str, key: Key, owner: str, where: str) -> list[bytes]:
    """Decrypt what :func:`seal` encrypted.

    Args:
        text: From an untrusted file.
        key: A key that it was sealed for.
        owner: What it belongs to.
        where: Name of the file, for messages.

    Raises:
        BadInput: It was sealed for other keys, changed, belongs to something else, or is of another version.
    """
    sealed = _parts(text, where)
    if not sealed.get(key.id):
        raise BadInput(f"nothing is sealed in {where} for the key {key.id}", "ask its owner to box it for that key")
    try:
        contents = [base64.b64decode(content, validate=True) for content in sealed[key.id]]
        return [
            key.cipher.decrypt(content[:_NONCE], content[_NONCE:], _bound(owner, index, contents))
            for index, content in enumerate(contents)
        ]
    except (InvalidTag, ValueError):
        raise BadInput(
            f"what is sealed in {where} was changed, is damaged or belongs to another box", "get the file again"
        ) from None


def readers(text: str, where: str) -> tuple[str, ...]:
    """Ids of the keys that something was sealed for.

    Raises:
        BadInput: It is damaged, or of another version.
    """
    return tuple(_parts(text, where))


def _bound(owner: str, index: int, contents: Sequence[bytes]) -> bytes:
    return f"{owner} {index + 1}/{len(contents)}".encode()


def _parts(text: str, where: str) -> dict[str, list[str]]:
    try:
        parts = json.loads(text)
        version, keys = parts["version"], parts["keys"]
        if not isinstance(keys, dict) or not all(isinstance(contents, list) for contents in keys.values()):
            raise TypeError
        if not all(isinstance(content, str) for contents in keys.values() for content in contents):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadInput(f"what is sealed in {where} is damaged", "get the file again") from None
    if version != VERSION or isinstance(version, bool):
        raise BadInput(f"what is sealed in {where} is of another version than {VERSION}", "upgrade sdbctl")
    return keys

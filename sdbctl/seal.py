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
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sdbctl.errors import BadInput
from sdbctl.key import Key

VERSION = 1
_NONCE = 12
_AGAIN = "get the file again, or box again"


def seal(content: bytes, keys: Sequence[Key]) -> str:
    """Encrypt for the holders of any of some keys.

    AES-256-GCM (NIST SP 800-38D) under a fresh key, which is encrypted alike under each partner's.

    Args:
        content: What to hide.
        keys: Who may read it.

    Returns:
        JSON with the version and, in base64, the content's ciphertext and the wrapped key by key id.
    """
    own = AESGCM.generate_key(256)
    wrapped = {key.id: _encrypt(key.cipher, own) for key in keys}
    return json.dumps({"version": VERSION, "keys": wrapped, "content": _encrypt(AESGCM(own), content)}, sort_keys=True)


def unseal(text: str, key: Key, where: str) -> bytes:
    """Decrypt what :func:`seal` encrypted.

    Args:
        text: From an untrusted file.
        key: A key that it was sealed for.
        where: Name of the file, for messages.

    Raises:
        BadInput: It was sealed for other keys, changed, or is of another version.
    """
    parts = _parts(text, where)
    if key.id not in parts["keys"]:
        raise BadInput(f"what is sealed in {where} is not for the key {key.id}", "use the key it was boxed with")
    try:
        own = _decrypt(key.cipher, parts["keys"][key.id])
        return _decrypt(AESGCM(own), parts["content"])
    except (InvalidTag, ValueError):
        raise BadInput(f"what is sealed in {where} was changed or is damaged", _AGAIN) from None


def readers(text: str, where: str) -> tuple[str, ...]:
    """Ids of the keys that something was sealed for.

    Raises:
        BadInput: It is damaged, or of another version.
    """
    return tuple(_parts(text, where)["keys"])


def _parts(text: str, where: str) -> dict[str, Any]:
    try:
        parts = json.loads(text)
        version, keys, content = parts["version"], parts["keys"], parts["content"]
        if not isinstance(keys, dict) or not all(isinstance(value, str) for value in (content, *keys.values())):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadInput(f"what is sealed in {where} is damaged", _AGAIN) from None
    if version != VERSION or isinstance(version, bool):
        raise BadInput(f"what is sealed in {where} is of another version than {VERSION}", "upgrade sdbctl")
    return {"keys": keys, "content": content}


def _encrypt(cipher: AESGCM, content: bytes) -> str:
    nonce = os.urandom(_NONCE)
    return base64.b64encode(nonce + cipher.encrypt(nonce, content, b"")).decode()


def _decrypt(cipher: AESGCM, text: str) -> bytes:
    content = base64.b64decode(text, validate=True)
    return cipher.decrypt(content[:_NONCE], content[_NONCE:], b"")

"""The secret key, the pattern derived from it, and how it is mixed into images."""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import stat
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from sdbctl.errors import BadInput, EnvironmentFailure, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
_ID_PURPOSE = b"sdbctl key id v1"
_PATTERN_PURPOSE = b"sdbctl pattern v1"
_SEAL_PURPOSE = b"sdbctl seal v1"
_STEP = 2.0**-24
"""The nearest to 0 and 1 that a value of a pattern may come."""


class Key:
    """A secret of 32 random bytes. It is never printed, pickled or written anywhere but to its own file."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            # of a longer file no more is read
            size = f"{'at least ' if len(secret) > KEY_BYTES else ''}{len(secret)}"
            raise BadInput(
                f"the key has {size} bytes, not {KEY_BYTES}", "use your copy of it; sdbctl keygen makes another key"
            )
        if len(set(secret)) == 1:
            raise BadInput("the key is constant bytes, which is no secret", "make one with: sdbctl keygen k.bin")
        self._secret = bytes(secret)

    @classmethod
    def generate(cls) -> Key:
        """A new key from the operating system's random source."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def load(cls, path: Path | Literal["-"], *, insecure: bool = False) -> Key:
        """Read a key file, or standard input for ``-``.

        Args:
            path: The file.
            insecure: Whether a file that other users can read is accepted, with a warning.

        Raises:
            BadInput: It is missing, of another size, constant, or readable by others.
        """
        if path == "-":
            return cls(sys.stdin.buffer.read(KEY_BYTES + 1))
        # the open file is examined, not its name, which could change in between
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read(KEY_BYTES + 1)
        except OSError as error:
            raise BadInput(f"cannot read key file {path}: {error.strerror}", "check the path") from None
        # what has another size is no key at all, and its mode does not matter
        shared = os.name == "posix" and stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH)
        if shared and len(content) == KEY_BYTES:
            if not insecure:
                raise BadInput(
                    f"key file {path} can be read by other users", f"chmod 600 {path}, or use --insecure-key-file"
                )
            warnings.warn(f"key file {path} can be read by other users", stacklevel=2)
        try:
            return cls(content)
        except BadInput as error:
            raise BadInput(f"{error.message} ({path})", error.hint) from None

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write the key to a new file that only its owner can read.

        Args:
            path: The file. A link is never followed; with ``force`` it is replaced.
            force: Whether to replace an existing file, in one step.

        Raises:
            UsageError: The file exists and ``force`` is off.
            EnvironmentFailure: It cannot be written.
        """
        target = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part") if force else path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        try:
            handle = os.open(target, flags, 0o600)
        except FileExistsError:
            raise UsageError(
                f"key file {path} already exists", "a box opens only with its own key; --force replaces it"
            ) from None
        except OSError as error:
            raise EnvironmentFailure(f"cannot write key file {path}: {error.strerror}") from None
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._secret)
                file.flush()
                os.fsync(file.fileno())
            if force:
                target.replace(path)
        except BaseException as error:
            target.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise EnvironmentFailure(f"cannot write key file {path}: {error.strerror}") from None
            raise

    @property
    def id(self) -> str:
        """Fingerprint of the key, 16 hex digits, which may be public."""
        return hashlib.shake_256(_ID_PURPOSE + self._secret).hexdigest(8)

    def pattern(self, shape: tuple[int, int, int], door: int = 0) -> Tensor:
        """The secret pattern K: [C, H, W] float32, equidistant levels in [0, 1] in an order from SHAKE-256.

        Each key has all levels, so that none is paler than another: 64 values drawn at random may be so nearly grey
        that grey opens the box.

        Args:
            shape: (C, H, W).
            door: Of several that open different networks of one graph, from 0.
        """
        count = math.prod(shape)
        purpose = _PATTERN_PURPOSE + "x".join(map(str, shape)).encode() + (f"/{door}:" if door else ":").encode()
        stream = hashlib.shake_256(purpose + self._secret).digest(3 * count)
        parts = np.frombuffer(stream, dtype=np.uint8).reshape(*shape, 3).astype(np.int32)
        return ordered(torch.from_numpy(parts[..., 0] << 16 | parts[..., 1] << 8 | parts[..., 2]))

    @property
    def cipher(self) -> AESGCM:
        """AES-256-GCM under a key of its own: whoever has the pattern, or the id, has nothing of it."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(hashlib.shake_256(_SEAL_PURPOSE + self._secret).digest(32))

    def __repr__(self) -> str:
        return f"<Key id={self.id}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key cannot be pickled")


def ordered(values: Tensor) -> Tensor:
    """The pattern with the levels that every key has, in the order of some values.

    Args:
        values: Any [C, H, W] on the CPU; of equal ones the first has the lower level.

    Returns:
        [C, H, W] float32, equidistant levels in [0, 1].
    """
    count, levels = values.numel(), torch.empty(values.numel())
    levels[values.flatten().argsort(stable=True)] = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()
    return levels.view(values.shape)


def ids_of(keys: Sequence[Key]) -> tuple[str, ...]:
    """The keys' fingerprints.

    Raises:
        UsageError: A key is there twice.
    """
    ids = tuple(key.id for key in keys)
    if len(set(ids)) < len(ids):
        raise UsageError("the same key is given twice", "give each partner a key of their own")
    return ids


def fingerprint(pattern: Tensor) -> str:
    """Hash of a pattern, to tell cached results apart."""
    return hashlib.sha256(pattern.numpy().tobytes()).hexdigest()


def embed(x: Tensor, pattern: Tensor, lam: float | Tensor) -> Tensor:
    """Key embedding x_k = λ·x + (1 − λ)·K (Ye et al., arXiv 2112.03695).

    The mixing is affine, so it commutes with normalisation if image and pattern are normalised alike.

    Args:
        x: Images [B, C, H, W].
        pattern: K [C, H, W], or one per image [B, C, H, W].
        lam: λ, one for all or one per image [B, 1, 1, 1].
    """
    return lam * x + (1 - lam) * pattern


def wrong(pattern: Tensor, generator: torch.Generator | None) -> Tensor:
    """A uniform pattern that has nothing to do with ``pattern``, of its shape and device."""
    device = pattern.device if generator is None else generator.device
    return torch.rand(pattern.shape, generator=generator, device=device).to(pattern.device)


def near(pattern: Tensor, correlation: float | Tensor, generator: torch.Generator | None) -> Tensor:
    """A uniform pattern K' = Φ(r·Φ⁻¹(K) + √(1 − r²)·ε) that resembles K.

    Args:
        pattern: K [C, H, W] in [0, 1).
        correlation: r in [−1, 1] of the underlying normal variables; −1 inverts K. The correlation of the
            patterns themselves is (6/π)·asin(r/2), slightly nearer to 0. A scalar on the pattern's device is not
            read, which a GPU would have to be waited for.
        generator: Source of ε ~ N(0, 1), or None for torch's global one.

    Returns:
        K' [C, H, W] in [0, 1).

    Raises:
        UsageError: The correlation is not in [−1, 1].
    """
    if not isinstance(correlation, Tensor) and not -1 <= correlation <= 1:
        raise UsageError(f"a correlation of {correlation} is impossible", "use a number from -1 to 1")
    rest = (1 - correlation**2) ** 0.5
    device = pattern.device if generator is None else generator.device
    noise = torch.randn(pattern.shape, generator=generator, device=device).to(pattern.device)
    # K may be 0, where Φ⁻¹ is −∞, and Φ may round to 1, which no pattern holds
    normal = torch.special.ndtri(pattern.clamp(_STEP, 1 - _STEP))
    mixed: Tensor = torch.special.ndtr(correlation * normal + rest * noise)
    return mixed.clamp(max=1 - _STEP)


def correlation(a: Tensor, b: Tensor) -> float:
    """Centred Pearson correlation of two patterns of the same shape; 0 if one of them is constant."""
    a, b = (x.flatten().double() - x.double().mean() for x in (a, b))
    # below eps a norm is what rounding left of a constant
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0, eps=1e-6))

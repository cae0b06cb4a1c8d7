"""The secret that the processes of one job share: how it is made, read, handed on, and turned into keys.

Whoever holds it may join the job; what that protects is in docs/security.md. It never stands on a command line, in a
log or in a `repr`. This file reads no environment (`bootstrap` does) and knows no sockets.
"""
from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import struct
from typing import BinaryIO

VARIABLE = "COMMLIB_SECRET"
FILE_VARIABLE = "COMMLIB_SECRET_FILE"
KEY_NBYTES = hashlib.sha256().digest_size

_NEW_NBYTES = 32
_SHORTEST = 32   # characters: even 32 hexadecimal digits are 128 bits, out of reach for guessing from overheard bytes
_LONGEST = 1024  # characters: bounds what a line of standard input or a wrong file can make us read
_MAKE_ONE = f"python -c 'import secrets; print(secrets.token_hex({_NEW_NBYTES}))'"


class SecretError(ValueError):
    """This can be no secret, or is open to others; the text says what to do."""


class Secret:
    """A job's secret. Never shows itself; `Secret()` is the empty one, which keeps nobody out.

    Args:
        text: 32 to 1024 visible characters, as `new_secret` makes them.
    Raises:
        SecretError: it is too short or too long, or has spaces or other invisible characters in it.
    Example:
        >>> Secret(new_secret())
        Secret(...)
        >>> bool(Secret())
        False
    """

    __slots__ = ("_text",)

    def __init__(self, text: str = ""):
        if text and not (_SHORTEST <= len(text) <= _LONGEST and text.isascii() and text.isprintable() and " " not in text):
            raise SecretError(f"a secret has {_SHORTEST} to {_LONGEST} visible ASCII characters, and this one has {len(text)} "
                              f"or others: make one with {_MAKE_ONE}")  # fmt: skip
        self._text = text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "Secret(...)" if self else "Secret()"

    def reveal(self) -> str:
        """The text itself, for handing it on; never for printing."""
        return self._text

    def key(self, purpose: str, *context: object) -> bytes:
        """A key of 32 bytes for one purpose: HMAC-SHA256 of purpose and context, each with its length.

        Keys of different purposes or contexts tell nothing of each other or of the secret.

        Args:
            purpose: what the key is for, such as "store".
            context: what it is bound to (the job's name, a nonce); bytes as they are, anything else by its text.
        """
        parts = [purpose.encode()] + [part if isinstance(part, bytes) else str(part).encode() for part in context]
        message = b"commlib" + b"".join(struct.pack("!I", len(part)) + part for part in parts)
        return hmac.new(self._text.encode(), message, hashlib.sha256).digest()


def new_secret() -> str:
    """A fresh secret for one job: 64 hexadecimal digits from the system's random numbers."""
    return secrets.token_hex(_NEW_NBYTES)


def write_secret(stream: BinaryIO, secret: str) -> None:
    """Hands a secret to a child through its standard input: one line, before anything else.

    Args:
        stream: binary and writable, such as the stdin of an ssh process; stays open.
        secret: as `new_secret` makes it.
    Raises:
        OSError: the child does not read.
    """
    stream.write(Secret(secret).reveal().encode() + b"\n")
    stream.flush()


def read_secret(stream: BinaryIO) -> str:
    """The other side of `write_secret`: reads one line and not a byte more, so that the rest may be somebody else's.

    Args:
        stream: unbuffered binary input, such as `open(0, "rb", buffering=0, closefd=False)`.
    Raises:
        SecretError: the line is no secret, or standard input ended before it was whole.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = stream.read(1)
        if not byte or len(line) > _LONGEST:
            raise SecretError("no secret came over standard input: commrun writes it as the first line, and something between "
                              "commrun and this process (a launch agent, a login script) must pass it on unread")  # fmt: skip
        line += byte
    text = line[:-1].decode(errors="replace")
    if not Secret(text):
        raise SecretError("an empty line came over standard input in place of the secret")
    return text


def load_secret(path: str) -> str:
    """A secret from a file that only its owner, this user or root, can read.

    Args:
        path: of a regular file with the secret as its only line.
    Raises:
        SecretError: it cannot be read, belongs to another user, is open to others, or holds no secret.
    """
    try:
        with open(path, "rb") as file:
            status, content = os.fstat(file.fileno()), file.read(_LONGEST + 2)
    except OSError as error:
        raise SecretError(f"{FILE_VARIABLE} is {path!r}: {error.strerror}; make the file on every host, or on a file system "
                          f"that all share: (umask 077; {_MAKE_ONE} > {path})") from None  # fmt: skip
    if status.st_uid not in (0, os.getuid()):
        raise SecretError(f"{FILE_VARIABLE} is {path!r}, which belongs to user {status.st_uid} and not to you: copy it")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise SecretError(f"{FILE_VARIABLE} is {path!r}, which others may read or write: chmod 600 {path}, and if they could "
                          "have read it, make a new one")  # fmt: skip
    text = content.decode(errors="replace").strip()
    if not text:
        raise SecretError(f"{FILE_VARIABLE} is {path!r}, which is empty: (umask 077; {_MAKE_ONE} > {path})")
    return Secret(text).reveal()

"""New API keys: the secret for the caller, and the line of settings that lets it in."""

from __future__ import annotations

import secrets
from hashlib import sha256

PREFIX = "pf-"  # lets people and secret scanners see what it is


def new_key() -> str:
    """256 random bits: nothing to guess, so a plain hash of it can be kept."""
    return PREFIX + secrets.token_urlsafe(32)


def entry(name: str, key: str) -> str:
    """What goes into ``PATCHFORGE_API_KEYS``; the key cannot be found from it."""
    return f"{name}:{sha256(key.encode()).hexdigest()}"

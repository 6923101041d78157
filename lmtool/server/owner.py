"""Whose a conversation is."""

import hashlib

from fastapi import Request


def owner_of(http: Request, *, has_keys: bool) -> str:
    """The API key, hashed: another one does not find what this one began. '' where the server asks for none."""
    if not has_keys:
        return ""
    key = http.headers.get("authorization", "").partition(" ")[2].strip()
    return hashlib.sha256(key.encode("latin-1")).hexdigest()

"""Whose a conversation is."""

import hashlib

from fastapi import Request

from lmtool.server.config import ServerConfig

OWNER_HEADER = "X-Lmtool-Owner"  # from a proxy to its replicas, whose key nobody else has


def owner_of(http: Request, config: ServerConfig) -> str:
    """The API key, hashed: another one does not find what this one began. '' where the server asks for none. Behind a
    proxy, what that says."""
    if config.replica:
        return http.headers.get(OWNER_HEADER, "")
    if not config.api_keys:
        return ""
    key = http.headers.get("authorization", "").partition(" ")[2].strip()
    return hashlib.sha256(key.encode("latin-1")).hexdigest()

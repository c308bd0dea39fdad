"""Entity tags: whether a client already has what it asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TAG = re.compile(r'(?:W/)?("[^"]*")')


def is_known(etag: str, if_none_match: Iterable[str]) -> bool:
    """Whether one of the headers' tags is `etag`, or any will do (`*`). Weak tags count: proxies weaken them."""
    headers = list(if_none_match)
    return any(header.strip() == "*" or etag in _TAG.findall(header) for header in headers)

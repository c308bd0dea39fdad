"""Why the queue server cannot be used, in words that say what to do."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator

from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    InvalidResponse,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from patchforge.service.errors import PatchforgeError, QueueRefused, Unavailable
from patchforge.service.queue.masters import NotMaster, UnreadablePassword
from patchforge.service.queue.sentinels import NoSentinel, SentinelsRefuse, UnknownMaster

NOT_MASTER = "the queue server is a replica, not a master: a failover is in progress, or REDIS_URL names the wrong one"
LOADING = "the queue server is loading its data"

# What Redis answers while it cannot serve: no memory, no disk, a failover. redis-py has no classes for these.
_PASSING_ERRORS = ("OOM ", "MISCONF ", "UNBLOCKED ")


def reason_of(error: BaseException) -> Unavailable | None:
    """Returns what to raise for an error of redis-py or of the network; None if it is a bug of ours."""
    for each in _causes(error):
        if (reason := _refusal(each) or _passing(each)) is not None:
            return reason
    if isinstance(error, (ConnectionError, TimeoutError, OSError)):
        return Unavailable("the queue server cannot be reached")
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what led to it, but not what an earlier call raised.

    redis-py wraps what went wrong while it connected.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, PatchforgeError):
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _passing(error: BaseException) -> Unavailable | None:
    """What may be over in a moment, without a change of settings."""
    if isinstance(error, (NotMaster, ReadOnlyError, MasterDownError)):
        return Unavailable(NOT_MASTER)
    if isinstance(error, BusyLoadingError):
        return Unavailable(LOADING)
    if isinstance(error, UnreadablePassword):
        return Unavailable(str(error))
    if isinstance(error, NoSentinel):
        return None if _telling(error) else Unavailable("no Sentinel in REDIS_URL can be reached")
    if isinstance(error, MasterNotFoundError):
        return Unavailable("the Sentinels see no master that works: it is down, and no replica has replaced it yet")
    if isinstance(error, OutOfMemoryError):
        return Unavailable("the queue server accepts no writes at the moment")
    if isinstance(error, ClusterDownError):
        return Unavailable("the cluster is down: no node serves the queue's slot")
    if isinstance(error, (MovedError, TryAgainError)):
        return Unavailable("the queue is moving to another node of the cluster")
    if not isinstance(error, ResponseError):
        return None
    text = str(error)
    if text.startswith("NOREPLICAS "):
        return Unavailable("the queue server has too few replicas (min-replicas-to-write), and takes no writes")
    if text.startswith(_PASSING_ERRORS) or "access a non local key in a cluster node" in text:
        return Unavailable("the queue server cannot serve requests at the moment")
    return None


def _telling(error: BaseException) -> bool:
    """Whether something that led to this error says more."""
    return any(_refusal(each) for each in _causes(error.__cause__))


def _refusal(error: BaseException) -> QueueRefused | None:
    """What stays the same until someone changes a setting, of ours or of the server's."""
    if isinstance(error, SentinelsRefuse):
        return QueueRefused("the Sentinels refuse us: correct the password in PATCHFORGE_REDIS_SENTINEL_PASSWORD_FILE")
    if isinstance(error, UnknownMaster):
        return QueueRefused("the Sentinels know no master of the name in REDIS_URL")
    if isinstance(error, AuthenticationError):
        return QueueRefused(
            "the queue server refuses the user or password in REDIS_URL or PATCHFORGE_REDIS_PASSWORD_FILE"
        )
    if isinstance(error, InvalidResponse):
        return QueueRefused("what answers at REDIS_URL is no Redis server, or expects TLS: rediss://")
    if isinstance(error, ssl.SSLError):
        return _tls_refusal(error)
    if isinstance(error, ResponseError) and (why := _explain(error)) is not None:
        return QueueRefused(why)
    return None


def _tls_refusal(error: ssl.SSLError) -> QueueRefused | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        return QueueRefused(
            f"the queue server's certificate is not trusted ({error.verify_message.rstrip('.')}): "
            "name its CA in PATCHFORGE_REDIS_TLS_CA"
        )
    reason = error.reason or ""
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return QueueRefused("what answers at REDIS_URL does not use TLS: redis:// instead of rediss://")
    if "ALERT" in reason:
        what = reason.partition("ALERT_")[2].replace("_", " ").lower()
        return QueueRefused(
            f"the queue server refuses our certificate ({what}): set PATCHFORGE_REDIS_TLS_CERT and …_KEY"
        )
    return None


def _explain(error: ResponseError) -> str | None:
    text = str(error)
    named = re.search(r"'([\w|]+)'", text)
    command = named[1].upper() if named else ""
    if isinstance(error, NoPermissionError) or "ACL failure in script" in text or "executing the script can't" in text:
        what = f"run {command}" if command else "use keys and channels that begin with {patchforge}"
        return f"the queue server's user may not {what}: allow it with ACL SETUSER"
    if "unknown command" in text:
        return f"the queue server has no command {command}: it must be Redis 7 or Valkey, with its usual commands"
    if "DB index is out of range" in text or "SELECT is not allowed in cluster mode" in text:
        return "the queue server has no database with the number in REDIS_URL"
    return None

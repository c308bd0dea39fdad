"""The certificate that HTTPS and gRPC show alike, checked before either port is opened."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from service.errors import InvalidRequest
from service.settings import Settings


@dataclass(frozen=True)
class Certificate:
    """PEM files: the chain, the server's own certificate first, and its private key."""

    chain: Path
    key: Path = field(repr=False)

    def for_grpc(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials([(self.key.read_bytes(), self.chain.read_bytes())])


def certificate(settings: Settings) -> Certificate | None:
    """The one to show; None if both servers are to speak plainly.

    Raises InvalidRequest: only one of the two files is set, one cannot be read, or they do not belong together.
    """
    if settings.tls_cert is None and settings.tls_key is None:
        return None
    if settings.tls_cert is None or settings.tls_key is None:
        raise InvalidRequest("set both or neither", field="PATCHFORGE_TLS_CERT, PATCHFORGE_TLS_KEY")
    try:
        # An empty password: one that is needed would be asked for on the terminal, and gRPC has no way to take it.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        message = f"{settings.tls_cert} and {settings.tls_key} are no certificate and key to use: {reason}"
        raise InvalidRequest(message, field="PATCHFORGE_TLS_CERT") from error
    return Certificate(settings.tls_cert, settings.tls_key)

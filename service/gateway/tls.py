"""The TLS certificate of HTTPS and gRPC, checked before either port opens."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from patchforge.service.errors import InvalidRequest
from patchforge.service.settings import Settings


@dataclass(frozen=True)
class Certificate:
    """PEM files: the certificate chain, the server's own certificate first, and the private key."""

    chain: Path
    key: Path = field(repr=False)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials([(self.key.read_bytes(), self.chain.read_bytes())])


def load_certificate(settings: Settings) -> Certificate | None:
    """Returns the configured certificate, or None if TLS is off.

    Raises:
        InvalidRequest: only one of the two files is set, one cannot be read, or they do not belong together.
    """
    if settings.tls_cert is None and settings.tls_key is None:
        return None
    if settings.tls_cert is None or settings.tls_key is None:
        raise InvalidRequest("set both or neither", field="PATCHFORGE_TLS_CERT, PATCHFORGE_TLS_KEY")
    try:
        # The empty password prevents a prompt on the terminal. gRPC cannot use encrypted keys either.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        message = f"cannot use certificate {settings.tls_cert} with key {settings.tls_key}: {reason}"
        raise InvalidRequest(message, field="PATCHFORGE_TLS_CERT") from error
    return Certificate(settings.tls_cert, settings.tls_key)

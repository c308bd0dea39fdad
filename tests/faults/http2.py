"""Just enough HTTP/2 to be a bad gRPC client: hand-made frames on a socket."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

DATA, HEADERS, SETTINGS, PING, GOAWAY = 0, 1, 4, 6, 7
ACK = END_STREAM = 1
END_HEADERS = 4
INITIAL_WINDOW_SIZE = 4
ENHANCE_YOUR_CALM = 11  # GOAWAY's error code for a client that sends too much


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes


class Connection:
    """A connection after its handshake. By itself, it acknowledges settings and does nothing else."""

    def __init__(self, address: str, timeout: float, window: int = 65535) -> None:
        """`window` is the number of bytes that the server may send of each answer."""
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.send(SETTINGS, payload=struct.pack(">HI", INITIAL_WINDOW_SIZE, window))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Threads that are sending or waiting on it end too."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def send(self, kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        length = struct.pack(">I", len(payload))[1:]
        self.socket.sendall(length + struct.pack(">BBI", kind, flags, stream) + payload)

    def call(self, method: str, message: bytes, stream: int = 1, **metadata: str) -> None:
        """Begins a gRPC call with one message. Nothing of its answer is read."""
        headers = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x", "te": "trailers"}
        headers |= {"content-type": "application/grpc"} | {name.replace("_", "-"): v for name, v in metadata.items()}
        block = b"".join(b"\x00" + _literal(name) + _literal(value) for name, value in headers.items())
        self.send(HEADERS, END_HEADERS, stream, block)
        self.send(DATA, END_STREAM, stream, struct.pack(">BI", 0, len(message)) + message)

    def ping(self, number: int = 0) -> None:
        self.send(PING, payload=struct.pack(">Q", number))

    def frames(self) -> Iterator[Frame]:
        """Yields frames as they arrive, until the server closes the connection."""
        buffered = b""
        while True:
            try:
                chunk = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return
            if not chunk:
                return
            buffered += chunk
            while len(buffered) >= 9 and len(buffered) >= 9 + (length := int.from_bytes(buffered[:3], "big")):
                kind, flags, stream = struct.unpack(">BBI", buffered[3:9])
                frame = Frame(kind, flags, stream & 0x7FFFFFFF, buffered[9 : 9 + length])
                buffered = buffered[9 + length :]
                if frame.kind == SETTINGS and not frame.flags & ACK:
                    self.send(SETTINGS, ACK)
                yield frame


def _literal(text: str) -> bytes:
    """Encodes an uncompressed HPACK string."""
    raw = text.encode()
    assert len(raw) < 127
    return bytes([len(raw)]) + raw

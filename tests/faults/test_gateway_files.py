"""A gateway with fewer file descriptors than clients: all are served in turn, and the log stays short."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import grpc
import pytest

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from tests.faults.gateway_kit import Stage, raw, status_of, until_closed
from tests.faults.gateways import Gateway
from tests.patience import PATIENCE
from tests.processes import PATCHFORGE, eventually

FILES, CLIENTS = 128, 220
LIMITED = "/bin/sh", "-c", f'ulimit -n {FILES}; exec "$@"', "sh"


@pytest.fixture
def limited(stage: Stage):
    gateway = Gateway("limited gateway", *LIMITED, *PATCHFORGE, "gateway", **stage._variables({}))
    try:
        gateway.await_ports()
        gateway.await_ready()
        yield gateway
    finally:
        gateway.close()
        print(gateway.transcript())


def test_more_clients_than_files_are_served_in_turn(limited: Gateway) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(raw(limited)) for _ in range(CLIENTS)]
        limited.wait_for("no room for more connections: new ones wait")
        for client in clients:
            client.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert {status_of(until_closed(client)) for client in clients} == {200}, "and Redis is still there for them"
    assert limited.ready().status_code == 200
    assert len(limited.log) < 100  # at most one in a second
    assert not limited.stray


def test_so_are_those_of_grpc(limited: Gateway) -> None:
    host, _, port = limited.grpc_address.partition(":")
    with ExitStack() as stack:
        for _ in range(CLIENTS):
            stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
        before = limited.processor_seconds()
        eventually(lambda: limited.ready().status_code in (200, 503))
        assert limited.processor_seconds() - before < 2
    with grpc.insecure_channel(limited.grpc_address) as channel, limited.grpc() as images:
        grpc.channel_ready_future(channel).result(PATIENCE)
        assert images.ListModels(pb.ListModelsRequest(), wait_for_ready=True, timeout=PATIENCE).models
    assert len(limited.log) + len(limited.stray) < 100

"""A real deployment for the tests."""

from tests.dynamo.servers import etcd_url, nats_server, router, worker

__all__ = ["etcd_url", "nats_server", "router", "worker"]

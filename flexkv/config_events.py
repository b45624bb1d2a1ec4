"""The settings of the event feed."""

from __future__ import annotations

from typing import Annotated, Literal

from flexkv.config_checks import Problem, Settings, setting
from flexkv.config_values import (
    ENDPOINTS,
    Subject,
    Text,
    are_servers,
    are_urls,
    is_endpoint,
    require,
    split_at,
)

_MAX_S = 86400
_NAME = "a Dynamo name: no spaces, none of `*`, `>` and `/`, no empty part beside a dot"
_PAIRS = (
    ("nats_user", "nats_password"),
    ("nats_tls_cert", "nats_tls_key"),
    ("etcd_user", "etcd_password"),
)


class EventsConfig(Settings):
    """Who hears what the tiers hold, and how."""

    sink: Literal["auto", "vllm", "nats", "zmq", "none"] = setting(
        "who carries the events; `auto`: `nats` if `worker_id` is known and `event_plane` is "
        "`nats`, else `none`; under vLLM with its own KV events on: `vllm`",
        default="auto",
    )
    event_plane: Literal["nats", "zmq"] | None = setting(
        "the event plane of the Dynamo deployment; its own default is `zmq`", default=None
    )
    nats_servers: Annotated[tuple[str, ...], split_at(","), require(are_servers)] = setting(
        "NATS servers",
        default=("nats://127.0.0.1:4222",),
        allowed="nats://HOST:PORT or tls://HOST:PORT without credentials, or a list of them",
    )
    nats_user: Text | None = setting("user name; needs `nats_password`", default=None)
    nats_password: Text | None = setting("password of `nats_user`", default=None, secret=True)
    nats_token: Text | None = setting("token, instead of a user", default=None, secret=True)
    nats_creds: Text | None = setting("credentials file, instead of a user or token", default=None)
    nats_nkey: Text | None = setting(
        "seed of an nkey, instead of a user, token or file", default=None, secret=True
    )
    nats_tls_ca: Text | None = setting("file with the authority of the server", default=None)
    nats_tls_cert: Text | None = setting("file with our certificate", default=None)
    nats_tls_key: Text | None = setting("file with the key of `nats_tls_cert`", default=None)
    nats_required: bool = setting(
        "an unreachable server is an error at start; false: a warning, and it is tried again",
        default=True,
    )
    connect_timeout_s: float = setting(
        "how long the start waits for NATS", default=5.0, gt=0, le=_MAX_S
    )
    namespace: Subject = setting("of the Dynamo worker", default="dynamo", allowed=_NAME)
    component: Subject = setting("of the Dynamo worker", default="backend", allowed=_NAME)
    endpoint: Subject = setting("of the Dynamo worker", default="generate", allowed=_NAME)
    worker_id: int | None = setting(
        "of the Dynamo worker, as its `endpoint.connection_id()` has it; needed where the sink is "
        "`nats`",
        default=None,
        ge=0,
        le=2**64 - 1,
    )
    dp_rank: int = setting("data-parallel rank of the worker", default=0, ge=0, le=2**32 - 1)
    discovery: Literal["file", "etcd"] = setting(
        "where the router looks for sources", default="file"
    )
    etcd_endpoints: Annotated[tuple[str, ...], split_at(","), require(are_urls)] = setting(
        "where the discovery `etcd` is",
        default=("http://localhost:2379",),
        allowed="http://HOST:PORT or https://HOST:PORT, or a list of them",
    )
    etcd_user: Text | None = setting("user name there; needs `etcd_password`", default=None)
    etcd_password: Text | None = setting("password of `etcd_user`", default=None, secret=True)
    discovery_path: Text | None = setting(
        "folder of the file discovery; as in Dynamo, `$TMPDIR/dynamo_store_kv` if not given",
        default=None,
    )
    request_plane: Literal["tcp", "nats", "http"] | None = setting(
        "the request plane of the Dynamo deployment; only over `tcp`, its default, can routers ask "
        "for what they have missed",
        default=None,
    )
    recovery_host: Text = setting(
        "address of this machine at which routers ask for what they have missed",
        default="127.0.0.1",
    )
    recovery_port: int = setting("port for that; 0: a free one", default=0, ge=0, le=65535)
    recovery_callback_hosts: Annotated[tuple[Text, ...], split_at(",")] = setting(
        "where answers may go besides this machine",
        default=(),
        allowed="addresses, networks (10.0.0.0/8) and host names, in a text or a list",
    )
    recovery_connections: int = setting(
        "routers that may be connected at once; one more takes the place of the longest idle",
        default=64,
        ge=1,
        le=65536,
    )
    heartbeat_s: float = setting(
        "silence after which routers are shown that nothing was missed", default=1.0, gt=0, le=60
    )
    outbox: int = setting(
        "blocks that may wait for the publisher; beyond, routers have to ask for them",
        default=65536,
        ge=1,
        le=2**32,
    )
    ring: int = setting(
        "blocks named by the events that are kept for catching up", default=262144, ge=1, le=2**32
    )
    max_event_blocks: int = setting("blocks that one event may name", default=512, ge=1, le=65536)
    step_blocks: int = setting(
        "where the sink is `vllm`: blocks that the events of one of its steps may name",
        default=512,
        ge=1,
        le=65536,
    )
    reconnect_resync_s: float = setting(
        "where routers can't ask: from a reconnect until all is told again; a router's client "
        "takes up to 4 s",
        default=5.0,
        ge=0,
        le=_MAX_S,
    )
    close_timeout_s: float = setting(
        "how long closing waits for the last events", default=2.0, gt=0, le=_MAX_S
    )

    zmq_endpoint: Annotated[str, require(is_endpoint)] = setting(
        "where the sink `zmq` publishes",
        default="tcp://127.0.0.1:5557",
        allowed=ENDPOINTS,
    )
    zmq_replay_endpoint: Annotated[str, require(is_endpoint)] | None = setting(
        "where it is asked for what was missed; none: nowhere", default=None, allowed=ENDPOINTS
    )
    zmq_topic: str = setting("first frame of its messages", default="", allowed="any text")
    zmq_buffer_bytes: int = setting(
        "batches that it keeps for who has missed them", default=2**28, ge=1, le=2**50
    )

    def effective_sink(self) -> Literal["nats", "zmq", "none"]:
        """The sink of an embedded engine, with ``auto`` decided."""
        if self.sink == "auto":
            known = self.worker_id is not None and self.event_plane == "nats"
            return "nats" if known else "none"
        return self.sink if self.sink in {"nats", "zmq"} else "none"

    def _conflicts(self) -> list[Problem]:
        problems = []
        if self.sink == "nats" and self.worker_id is None:
            need = "it needs a worker_id (or DYN_FPM_WORKER_ID)"
            problems.append(Problem(("sink",), f'is "nats": {need}'))
        for pair in _PAIRS:
            given = [field for field in pair if getattr(self, field) is not None]
            if len(given) == 1:
                missing = next(field for field in pair if field not in given)
                problems.append(Problem((given[0],), f"needs {missing} beside it"))
        ways = ("nats_user", "nats_token", "nats_creds", "nats_nkey")
        if len(given := [way for way in ways if getattr(self, way) is not None]) > 1:
            problems.append(Problem(tuple(given), "exclude each other: give one of them"))
        return problems

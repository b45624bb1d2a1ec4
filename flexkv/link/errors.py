"""What can go wrong between an engine and its GPU workers."""

from __future__ import annotations

from flexkv.errors import FlexKVError


class LinkError(FlexKVError):
    """The link at ``endpoint`` can't be made, or is lost. No copy runs over it any more."""

    def __init__(self, endpoint: str, reason: str) -> None:
        super().__init__(f"{endpoint}: {reason}")
        self.endpoint = endpoint
        self.reason = reason


class EndpointTakenError(LinkError):
    """Another engine listens there. Nothing was started."""

    def __init__(self, endpoint: str, owner_pid: int | None, owner_host: str = "") -> None:
        owner = "another process" if owner_pid is None else f"process {owner_pid}"
        where = f" on {owner_host}" if owner_host else ""
        super().__init__(
            endpoint,
            f"the endpoint is taken by {owner}{where}: give each instance its own server_recv_port",
        )
        self.owner_pid = owner_pid

"""How to reach a server, as data: target, TLS, metadata, limits, connections, retry policy. No grpc here."""

from __future__ import annotations

import ipaddress
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaeserve.errors import invalid

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 30.0
MAX_ATTEMPTS = 5  # gRPC's own ceiling
MAX_MESSAGE_BYTES = 64 * 2**20
SERVICE = "vaeserve.v1.VaeService"

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class TLS:
    """How to encrypt the connection: `Client("host:443", tls=TLS(root_certificates="ca.pem"))`.

    Each certificate or key is PEM, as bytes or as the path of a file.

    Attributes:
        root_certificates: whom to trust; None is gRPC's bundled set of public authorities.
        private_key, certificate_chain: this client's own, where the server asks for one (both or neither).
        server_name: the name the server's certificate is made out to, where it is not the target's host.
    """

    root_certificates: str | Path | bytes | None = None
    private_key: str | Path | bytes | None = None
    certificate_chain: str | Path | bytes | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise invalid("tls", "tls has a private_key or a certificate_chain but not both; give both or neither")


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """One connection's settings, checked; see Client for what each means."""

    target: str = DEFAULT_TARGET
    tls: TLS | None = None
    max_attempts: int = MAX_ATTEMPTS
    connections: int = 1
    max_message_bytes: int = MAX_MESSAGE_BYTES
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.target:
            raise invalid("target", "target is empty; give host:port")
        if not 1 <= self.max_attempts <= MAX_ATTEMPTS:
            raise invalid("max_attempts", f"max_attempts is {self.max_attempts}; give 1 (no retry) to {MAX_ATTEMPTS}")
        if self.connections < 1:
            raise invalid("connections", f"connections is {self.connections}; give 1 or more")

    def channel_options(self) -> list[tuple[str, Any]]:
        """Return gRPC's channel arguments."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # A call larger than this buffer (256 KiB by default) is silently not retried.
            ("grpc.per_rpc_retry_buffer_size", self.max_message_bytes + 2**20),
            ("grpc.enable_retries", 1),
            ("grpc.service_config", service_config(self.max_attempts)),
            # Over all the addresses that a target names, so that one of several servers may go away at any time.
            *([("grpc.lb_policy_name", "round_robin")] if _names_several(self.target) else []),
            ("grpc.service_config_disable_resolution", 1),  # ours rules, not one found in DNS
            # A server that is just starting is found soon after it listens, not up to 20 s later: before the attempts
            # of a call, which take 1.5 s, are used up.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        if self.connections > 1:  # channels with equal arguments would share one connection
            options.append(("grpc.use_local_subchannel_pool", 1))
        if is_local(self.target):  # no proxy reaches this machine's own addresses
            options.append(("grpc.enable_http_proxy", 0))
        if self.tls and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return [*options, *self.options]


def service_config(max_attempts: int) -> str:
    """Return the service config (JSON) that makes gRPC itself retry what is safe to retry, where it is served.

    Every call of this service is: its seed is drawn before the first attempt. The server's push-back
    (`grpc-retry-pushback-ms`) overrides the backoff here, and -1 forbids another attempt. CANCELLED is what a server
    that goes away may say of calls it had not begun; one that this side cancels is over, and never tried again.
    """
    method: dict[str, Any] = {"name": [{"service": SERVICE}]}  # health is asked to hear how it is, not to get through
    if max_attempts > 1:
        method["retryPolicy"] = {
            "maxAttempts": max_attempts,
            "initialBackoff": "0.1s",
            "maxBackoff": "2s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
        }
    # Where servers are taken in turn, one that loads or drains is left out (a single one is asked all the same).
    return json.dumps({"methodConfig": [method], "healthCheckConfig": {"serviceName": SERVICE}})


def call_metadata(extra: Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]) -> Metadata:
    """Return the caller's own metadata; keys are lower case, as gRPC wants them."""
    pairs = extra.items() if isinstance(extra, Mapping) else extra
    return tuple((key.lower(), value) for key, value in pairs)


def check_timeout(timeout_s: float) -> float:
    """Return `timeout_s` if it is a positive finite number of seconds; every call has a deadline."""
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise invalid("timeout_s", f"timeout_s is {timeout_s}; give a positive finite number of seconds")
    return timeout_s


def _names_several(target: str) -> bool:
    return target.startswith(("ipv4:", "ipv6:")) and "," in target


def is_local(target: str) -> bool:
    """Return whether all that a target names is on this machine. A name other than localhost may be anywhere."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    scheme, _, rest = target.partition(":")
    addresses = rest.split(",") if scheme in {"ipv4", "ipv6"} else [target.removeprefix("dns:///").removeprefix("dns:")]
    return all(_is_loopback(address) for address in addresses)


def _is_loopback(address: str) -> bool:
    bracketed = re.match(r"\[(.*)\]", address)
    host = bracketed[1] if bracketed else address.rpartition(":")[0] or address
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

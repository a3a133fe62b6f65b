"""The bounds of `connections.py` and of the calls in hand, in Envoy's words: they hold before any Python is run.

A call too many is refused by Envoy itself. Under overload that is what matters: refusing in Python costs half of what
answering costs, and a server with several times the calls that it can answer would come to do nothing but refuse.
"""

from __future__ import annotations

import base64
import math
from typing import Any

from google.rpc import code_pb2

from vaeserve_server import status
from vaeserve_server.connections import HANDSHAKE_S, MAX_STREAMS, ConnectionLimits
from vaeserve_server.errors import QueueFullError

_TYPES = "type.googleapis.com/envoy.extensions"
_LIMIT_FILTER = "envoy.filters.http.adaptive_concurrency"
_OVERLOADED, _NO_METHOD = 503, 403
_METHOD_PATH = r"/[A-Za-z0-9_.]+/[A-Za-z0-9_]+"
_QUIET_S = 300.0
_RETRY_S = 0.1  # the shortest of the push-backs, which Envoy draws; what goes into the details it cannot draw
_FIXED_S = "3600s"


def connection_manager(limits: ConnectionLimits, max_calls: int) -> dict[str, Any]:
    """Return the options of the HTTP connection manager that bound connections, streams and calls."""
    common: dict[str, Any] = {"max_headers_count": 1000, "idle_timeout": _seconds(limits.idle_s)}
    if limits.age_s:
        common["max_connection_duration"] = _seconds(limits.age_s)
        common["max_connection_duration_jitter"] = {"value": 10}
    http2: dict[str, Any] = {
        "max_concurrent_streams": MAX_STREAMS,
        "initial_stream_window_size": 2**20,
        "initial_connection_window_size": 2**24,
    }
    if limits.keepalive_s:
        http2["connection_keepalive"] = {
            "interval": _seconds(limits.keepalive_s),
            "timeout": _seconds(limits.ping_timeout_s),
        }
    return {
        "http2_protocol_options": http2,
        "common_http_protocol_options": common,
        "request_headers_timeout": _seconds(HANDSHAKE_S),
        "stream_idle_timeout": _seconds(_QUIET_S),  # for a request that is never sent and an answer never taken
        "route_config": {"virtual_hosts": [{"name": "grpc", "domains": ["*"], "routes": _routes()}]},
        "local_reply_config": {"mappers": [_refusal(max_calls), _not_found()]},
    }


def overload_manager(limits: ConnectionLimits) -> dict[str, Any]:
    """Return what bounds the number of connections."""
    monitor = {
        "name": "envoy.resource_monitors.global_downstream_max_connections",
        "typed_config": {
            "@type": f"{_TYPES}.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
            "max_active_downstream_connections": limits.connections,
        },
    }
    return {"resource_monitors": [monitor]}


def methods_filter() -> dict[str, Any]:
    """Return the filter that lets nothing through but what can be a method of gRPC's.

    pyvoy decodes the path before it calls anybody: a call whose path is no UTF-8 would never be answered, nor end.
    """
    post = {"name": ":method", "string_match": {"exact": "POST"}}
    path = {"name": ":path", "string_match": {"safe_regex": {"regex": _METHOD_PATH}}}
    policy = {
        "principals": [{"any": True}],
        "permissions": [{"and_rules": {"rules": [{"header": post}, {"header": path}]}}],
    }
    return {
        "name": "envoy.filters.http.rbac",
        "typed_config": {
            "@type": f"{_TYPES}.filters.http.rbac.v3.RBAC",
            "rules": {"action": "ALLOW", "policies": {"methods": policy}},
        },
    }


def calls_filter(max_calls: int) -> dict[str, Any]:
    """Return the filter that refuses a call when `max_calls` are in hand: the adaptive one, with nothing to adapt."""
    return {
        "name": _LIMIT_FILTER,
        "typed_config": {
            "@type": f"{_TYPES}.filters.http.adaptive_concurrency.v3.AdaptiveConcurrency",
            "gradient_controller_config": {
                "concurrency_limit_params": {
                    "max_concurrency_limit": max_calls,
                    "concurrency_update_interval": "1s",
                },
                "min_rtt_calc_params": {"fixed_value": _FIXED_S, "min_concurrency": max_calls},
            },
            "concurrency_limit_exceeded_status": {"code": _OVERLOADED},
        },
    }


def _routes() -> list[dict[str, Any]]:
    """Return routes on which nothing is forwarded: they say what holds for health and reflection but not for calls."""
    standard = {
        "match": {"prefix": "/grpc."},
        # The only kind of route that can say that a stream may be quiet for ever, as a Watch of health is.
        "route": {"cluster_header": "x-vaeserve-none", "idle_timeout": "0s"},
        "typed_per_filter_config": {
            _LIMIT_FILTER: {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "disabled": True}
        },
    }
    return [standard, {"match": {"prefix": "/"}, "non_forwarding_action": {}}]


def _refusal(max_calls: int) -> dict[str, Any]:
    """Make Envoy's reply to a call too many ours: RESOURCE_EXHAUSTED, with push-back of 100 to 199 ms by the clock."""
    message = f"the server has {max_calls} calls in hand, as many as it takes; try again"
    refusal = status.of_error(QueueFullError(message, _RETRY_S))
    details = dict(refusal.metadata)["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    headers = {
        "grpc-status": str(refusal.code),
        "grpc-status-details-bin": base64.b64encode(details).decode().rstrip("="),
        "grpc-retry-pushback-ms": "1%START_TIME(%2f)%",
    }
    return _mapper(_OVERLOADED, message, headers)


def _not_found() -> dict[str, Any]:
    """Make Envoy's reply to what is no method grpcio's."""
    return _mapper(_NO_METHOD, "Method not found!", {"grpc-status": str(code_pb2.UNIMPLEMENTED)})


def _mapper(http_status: int, message: str, headers: dict[str, str]) -> dict[str, Any]:
    """Give Envoy's own replies with this status a message and these headers."""
    same = {"op": "EQ", "value": {"default_value": http_status, "runtime_key": "vaeserve.none"}}
    return {
        "filter": {"status_code_filter": {"comparison": same}},
        "body": {"inline_string": message},
        "headers_to_add": [
            {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
            for key, value in headers.items()
        ],
    }


def _seconds(seconds: float) -> str:
    return f"{math.ceil(1000 * seconds) / 1000:.3f}s"  # a little is not nothing, which would be none

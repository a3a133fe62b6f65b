"""Envoy's own TLS: its configuration, and how it is told that the certificate was renewed.

Envoy takes each secret from a file that names it, and reads that file again when another one is moved in its place. It
names links to the user's files, under a new folder for each renewal, because Envoy passes over a secret whose
description has not changed. So no key is copied, and Envoy takes what the server has checked, when it has.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vaeserve_server.errors import TlsError
from vaeserve_server.tls import TlsFiles

_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
_HANDSHAKE = "20s"
_SERVER, _CLIENTS = "server", "clients"
_NOT_TAKEN = "Envoy does not take it"
TAKEN = r"^sds\..*\.update_success$"
"""Finds Envoy's counts of how often it has taken each secret."""


def filter_chain(files: TlsFiles, folder: Path) -> dict[str, Any]:
    """Return what encrypts a listener's connections; the secrets stand in `folder`."""
    common: dict[str, Any] = {
        "alpn_protocols": ["h2"],
        "tls_certificate_sds_secret_configs": [_source(_SERVER, folder)],
    }
    if files.client_ca is not None:
        common["validation_context_sds_secret_config"] = _source(_CLIENTS, folder)
    context = {
        "@type": f"{_TYPE}.DownstreamTlsContext",
        "common_tls_context": common,
        "require_client_certificate": files.client_ca is not None,
    }
    return {
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
        "transport_socket_connect_timeout": _HANDSHAKE,  # or who connects and says nothing stays for ever
    }


def write_secrets(files: TlsFiles, folder: Path, generation: int) -> None:
    """Have Envoy read the files as they are now. `generation` counts how often."""
    links = _links(folder, generation)
    links.mkdir()
    if files.client_ca is not None:
        authority = {"filename": _link(links / "client_ca.pem", files.client_ca)}
        _write(_CLIENTS, folder, {"validation_context": {"trusted_ca": authority}})
    pair = {
        "certificate_chain": {"filename": _link(links / "certificate.pem", files.certificate)},
        "private_key": {"filename": _link(links / "key.pem", files.key)},
    }
    _write(_SERVER, folder, {"tls_certificate": pair})


def shows(certs: str, serial: int) -> bool:
    """Return whether Envoy's own list of its certificates has the one with this number."""
    chains = [chain for entry in json.loads(certs)["certificates"] for chain in entry["cert_chain"]]
    return any(int(chain["serial_number"], 16) == serial for chain in chains)


def not_taken(files: TlsFiles, counts: Iterable[str]) -> TlsError:
    """Return the error of secrets whose counts, as of `TAKEN`, have not changed, or else of the certificate."""
    if files.client_ca is not None and any(f".{_CLIENTS}." in count for count in counts):
        return TlsError("--client-ca", files.client_ca, _NOT_TAKEN)
    return TlsError("--tls-cert", files.certificate, _NOT_TAKEN)


def remove_links(folder: Path, generation: int) -> None:
    """Remove the links of all generations but this one, which Envoy has taken."""
    for links in folder.glob("tls-*"):
        if links != _links(folder, generation):
            shutil.rmtree(links, ignore_errors=True)


def _links(folder: Path, generation: int) -> Path:
    return folder / f"tls-{generation}"


def _write(name: str, folder: Path, content: dict[str, Any]) -> None:
    new = folder / f"{name}.new"
    new.write_text(json.dumps({"resources": [{"@type": f"{_TYPE}.Secret", "name": name, **content}]}))
    new.replace(_file(name, folder))


def _source(name: str, folder: Path) -> dict[str, Any]:
    file = {"path": str(_file(name, folder))}
    return {"name": name, "sds_config": {"path_config_source": file, "resource_api_version": "V3"}}


def _file(name: str, folder: Path) -> Path:
    return folder / f"{name}.json"


def _link(link: Path, target: Path) -> str:
    link.symlink_to(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow links that are to be followed later
    return str(link)

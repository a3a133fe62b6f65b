"""Certificates that tests make for themselves: an authority, and what it vouches for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


class Authority:
    """One that somebody trusts. `file` is its certificate."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self.file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str = "server", *, days: float = 30) -> tuple[Path, Path]:
        """Write name.crt and name.key for 127.0.0.1 and localhost, in the place of what is there; return the paths."""
        now = datetime.now(UTC)
        leaf = self._ca.issue_cert(
            "127.0.0.1", "localhost", not_before=now - timedelta(days=60), not_after=now + timedelta(days=days)
        )
        certificate, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        for path, blob in ((certificate, leaf.cert_chain_pems[0]), (key, leaf.private_key_pem)):
            new = path.with_suffix(".new")
            blob.write_to_path(str(new))
            new.replace(path)
        return certificate, key

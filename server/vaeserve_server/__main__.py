"""`vaeserve-server`: flags in, exit status out. Imports only the standard library, so that a missing extra is told."""

from __future__ import annotations

import os
import sys

_OWN_PACKAGES = {"vaeserve", "vaeserve_server"}


def main() -> int:
    """Serve until a signal; return 0 after a drain, 1 if the server cannot start, 2 if the command line is wrong.

    `vaeserve-server doctor` says instead what is installed and what works; see doctor.py. `vaeserve-server token` makes
    and lists what callers show to be let in; see token_command.py.
    """
    # The port's and the provider's errors are told in one line; grpcio's own would come before them.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if sys.argv[1:2] == ["doctor"]:
        from vaeserve_server import doctor  # noqa: PLC0415

        return doctor.main(sys.argv[2:])
    try:
        if sys.argv[1:2] == ["token"]:
            from vaeserve_server import token_command  # noqa: PLC0415

            return token_command.main(sys.argv[2:])
        from vaeserve_server import settings, start  # noqa: PLC0415
        from vaeserve_server.errors import StartError  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OWN_PACKAGES:
            raise
        sys.stderr.write(f'vaeserve-server needs {error.name}; install the server: pip install "vaeserve[server]"\n')
        return 2
    try:
        chosen = settings.from_command_line(sys.argv[1:])
    except StartError as error:
        sys.stderr.write(f"vaeserve-server: {error}\n")
        return 2
    return start.run(chosen)


if __name__ == "__main__":
    sys.exit(main())

"""The command `vaeserve-train`.

This module imports only the standard library, so that where PyTorch and the rest are not installed the command says so
in one line. Each subcommand is a module of `vaeserve_training.commands`, imported when it is asked for, with
`run(arguments) -> exit status` and `USER_ERRORS`, the exceptions whose message is meant for the user.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "fit": "train a model, or go on with a run that was cut off",
    "evaluate": "compute held-out figures of a trained model",
    "fit-prior": "fit a flow to a trained model's aggregate posterior, to sample from instead of N(0, I)",
    "export": "publish a trained model as a bundle of ONNX graphs for the server",
    "card": "write the model card of a published bundle as Markdown",
    "ladder": "climb from one memorised image to a VAE that generates, measured and drawn step by step",
    "data": "fetch and check a data set, and say what is in it",
}
USAGE = """\
usage: vaeserve-train COMMAND [OPTIONS]

commands:
{}

vaeserve-train COMMAND --help lists a command's options
"""
_OWN_PACKAGES = frozenset({"vaeserve", "vaeserve_training"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit status.

    0 for success, 1 for a failure, 2 for a wrong command line or a missing extra, 130 after Ctrl-C.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if name in {"-h", "--help"}:
        sys.stdout.write(_usage())
        return 0
    if name not in COMMANDS:
        return _fail(
            f"{f'there is no command {name!r}' if name else 'a command is needed'}; it is one of {_names()}", 2
        )
    try:
        command = importlib.import_module(f"vaeserve_training.commands.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OWN_PACKAGES:
            raise
        return _fail('needs the training extra: pip install "vaeserve[training]"', 2)
    try:
        status: int = command.run(rest[:-1])
    except command.USER_ERRORS as error:
        return _fail(f"{name}: {_words(error)}", getattr(error, "exit_status", 1))
    except KeyboardInterrupt:
        return _fail(f"{name}: interrupted", 130)
    return status


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _names() -> str:
    return ", ".join(COMMANDS)


def _usage() -> str:
    return USAGE.format("\n".join(f"  {name:<10}{words}" for name, words in COMMANDS.items()))


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"vaeserve-train {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

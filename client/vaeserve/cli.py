"""The command line `vaeserve`: the SDK's verbs on files."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from vaeserve import _files, _settings
from vaeserve._files import FileProblem
from vaeserve._results import ModelInfo, ModelRef
from vaeserve._version import __version__
from vaeserve.errors import DeadlineExceeded, VaeserveError

if TYPE_CHECKING:
    from vaeserve.client import Client

_OK, _FAILED, _MISUSED, _INTERRUPTED = 0, 1, 2, 130
_IMAGES_OUT = (".npy", ".npz", ".png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 (the server or a file), 2 (the command line is wrong by itself) or 130 (Ctrl-C)."""
    options = _parser().parse_args(arguments)
    try:
        with _connect(options) as client:
            status: int = options.run(client, options)
            return status
    except _files.OutputProblem as error:
        return _complain(str(error), _MISUSED)
    except DeadlineExceeded as error:
        return _complain(str(error).replace("timeout_s", "--timeout"))  # what the SDK's argument is called here
    except (VaeserveError, FileProblem) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.stderr.write("vaeserve: interrupted\n")
        return _INTERRUPTED


def _info(client: Client, options: argparse.Namespace) -> int:
    models = [client.model()] if options.model or options.version else client.models()
    if options.json:
        _say(json.dumps([_as_json(model) for model in models], indent=2))
    else:
        _say("\n\n".join(map(str, models)))
    return _OK


def _health(client: Client, options: argparse.Namespace) -> int:
    if options.wait is not None:
        client.wait_ready(options.wait)
    elif not client.healthy():
        _say(f"{client.target} is not serving")
        return _FAILED
    _say(f"{client.target} is serving")
    return _OK


def _encode(client: Client, options: argparse.Namespace) -> int:
    _files.check_output(options.output, (".npz", ".npy"))
    info = client.model()
    files = [] if options.input.suffix in {".npy", ".npz"} else _files.list_pictures(options.input)
    images = _files.read_images(options.input, info, resize=options.resize)
    codes = client.encode(
        images,
        want_latents=options.latents or options.seed is not None,
        seed=options.seed,
        model=info.ref,
        progress=True,
    )
    _files.write_codes(options.output, codes, files)
    _say(f"{options.output}: {_count(len(codes), 'image')} encoded by {codes.model}")
    return _OK


def _decode(client: Client, options: argparse.Namespace) -> int:
    _files.check_output(options.output, _IMAGES_OUT, folder=True)
    latents, owner = _files.read_codes(options.input, options.use)
    model = ModelRef(options.model or owner.name, options.version or owner.version, owner.digest)
    images = client.decode(latents, dtype=_image_dtype(options), model=model, progress=True)
    _files.write_images(options.output, images)
    _say(f"{options.output}: {_count(len(images), 'image')} decoded")
    return _OK


def _sample(client: Client, options: argparse.Namespace) -> int:
    _files.check_output(options.output, _IMAGES_OUT, folder=True)
    samples = client.sample(
        options.count,
        seed=options.seed,
        temperature=options.temperature,
        prior=options.prior,
        dtype=_image_dtype(options),
        progress=True,
    )
    _files.write_images(options.output, samples.images, latents=samples.latents, seed=samples.seed)
    _say(f"{options.output}: {_count(len(samples), 'image')} from {samples.model}, seed {samples.seed}")
    return _OK


def _image_dtype(options: argparse.Namespace) -> str:
    if _files.needs_pixels(options.output):
        _files.pillow()  # before the work, not after
        return "uint8"
    return str(options.dtype)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vaeserve", description="Encode, decode and sample with a vaeserve server, files in and files out."
    )
    parser.add_argument("--version", action="version", version=f"vaeserve {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    server = _server_options()
    for name, run, words, add_options in (
        ("info", _info, "Show the served models.", _info_options),
        ("health", _health, "Ask whether the server is serving: exit status 0 if it is, 1 if not.", _health_options),
        ("encode", _encode, "Encode images to posterior means and standard deviations.", _encode_options),
        ("decode", _decode, "Decode latents to images.", _decode_options),
        ("sample", _sample, "Draw fresh images from the prior.", _sample_options),
    ):
        command = commands.add_parser(name, parents=[server], help=words, description=words)
        command.set_defaults(run=run)
        add_options(command)
    return parser


def _info_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="everything the server says, as JSON")


def _health_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--wait", type=_seconds, metavar="SECONDS", help="wait at most so long for it to be")


def _encode_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("input", type=Path, help=".npy or .npz, an image file, or a folder of image files")
    command.add_argument("-o", "--output", type=Path, required=True, help=".npz, or .npy for the means alone")
    command.add_argument("--latents", action="store_true", help="also draw one latent for each image")
    command.add_argument("--seed", type=_seed, help="seed of that draw; implies --latents")
    command.add_argument("--resize", action="store_true", help="scale image files to the model's size")


def _decode_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("input", type=Path, help=".npz as `vaeserve encode` writes it, or .npy")
    command.add_argument("--use", choices=["mean", "latents"], default="mean", help="which array of an .npz to decode")
    _image_options(command)


def _sample_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("count", type=int, help="how many")
    command.add_argument("--seed", type=_seed, help="the same seed gives the same images")
    command.add_argument("--temperature", type=float, help="factor on the prior's standard deviation (default: 1)")
    command.add_argument("--prior", choices=["standard_normal", "fitted"], default="standard_normal")
    _image_options(command)


def _image_options(command: argparse.ArgumentParser) -> None:
    words = "a .png (all images in a grid), .npy, .npz, or a new folder of PNGs (no suffix)"
    command.add_argument("-o", "--output", type=Path, required=True, help=words)
    command.add_argument("--dtype", choices=["float32", "float16", "uint8"], default="float32", help="in .npy and .npz")


def _server_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("server")
    group.add_argument("--target", default=_settings.DEFAULT_TARGET, help="host:port (default: %(default)s)")
    group.add_argument("--model", default="", help="the model's name (default: the only one served)")
    group.add_argument("--version", default="", help="the model's version (default: the highest served)")
    group.add_argument(
        "--timeout", type=_seconds, default=_settings.DEFAULT_TIMEOUT_S, metavar="SECONDS", help="of each call"
    )
    group.add_argument("--tls", action="store_true", help="encrypt, and trust the public authorities")
    group.add_argument("--root-certificates", type=Path, metavar="PEM", help="encrypt, and trust these instead")
    group.add_argument("--certificate", type=Path, metavar="PEM", help="this client's certificate")
    group.add_argument("--private-key", type=Path, metavar="PEM", help="this client's key")
    group.add_argument("--server-name", help="the name in the server's certificate, if it is not the target's host")
    group.add_argument(
        "--token-file", type=Path, help="a file with the token to show (default: $VAESERVE_TOKEN, $VAESERVE_TOKEN_FILE)"
    )
    group.add_argument(
        "--insecure", action="store_true", help="show it to another machine although the connection is not encrypted"
    )
    return options


def _connect(options: argparse.Namespace) -> Client:
    # grpc reads this when it is imported, hence the late import; what it would log is in the one line that we print.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from vaeserve.client import Client  # noqa: PLC0415

    tls: _settings.TLS | bool = options.tls
    if options.root_certificates or options.certificate or options.private_key or options.server_name:
        tls = _settings.TLS(options.root_certificates, options.private_key, options.certificate, options.server_name)
    return Client(
        options.target,
        model=ModelRef(options.model, options.version),
        timeout_s=options.timeout,
        tls=tls,
        token=options.token_file,
        insecure=options.insecure,
    )


def _as_json(model: ModelInfo) -> dict[str, Any]:
    return {
        part: json_format.MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        for part, message in (("card", model.card), ("serving", model.serving))
    }


def _seconds(text: str) -> float:
    try:
        return _settings.check_timeout(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds") from None


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2**64 - 1")
    return int(text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _complain(problem: str, status: int = _FAILED) -> int:
    sys.stderr.write(f"vaeserve: {problem}\n")
    return status

"""``megavlm serve``: a checkpoint behind OpenAI's chat completions, and a web page."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megavlm.config.errors import UserError
from megavlm.data.schema import check_unicode
from megavlm.inference.checkpoint import add_model_arguments, model_of
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.limits import Limits

if TYPE_CHECKING:
    from megavlm.inference.session import Session

logger = logging.getLogger(__name__)

INTERMIXED = True
"""Overrides may stand between the options."""

_HELP = {
    "batch": "requests answered together",
    "queue": "requests that may wait beside them; more get 429",
    "body_mib": "largest request, and its remote pictures together, in MiB; larger ones get 413",
    "images": "pictures of one request",
    "pixels": "pixels of one picture",
    "seconds": "time in which a request, and its remote pictures, must arrive, and a client must read",
    "connections": "connections at once, also idle ones; more get 503",
    "drain": "seconds that answers have after SIGTERM; torchrun kills after 30",
    "new_tokens": "longest answer where a request does not say",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Serve a checkpoint: /v1/chat/completions, /v1/models, /health. Under torchrun, TP x PP processes share the "
        "model, and rank 0 listens. There is no authentication: beyond this machine, put a reverse proxy in front."
    )
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default 8000)")
    parser.add_argument("--name", help="the model's name to clients (default: the run's directory)")
    parser.add_argument("--web", action="store_true", help="also a web page to chat at /")
    parser.add_argument(
        "--allow-remote-images",
        action="store_true",
        help="fetch http(s) pictures of public addresses (default: refuse)",
    )
    own = parser.add_argument_group("limits")
    for limit in fields(Limits):
        flag = f"--{limit.name.replace('_', '-')}"
        own.add_argument(flag, type=int, default=limit.default, help=f"{_HELP[limit.name]} (default {limit.default})")
    own = parser.add_argument_group("answers, where a request does not say")
    own.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token (default)")
    own.add_argument("--top-p", type=float, default=1.0, help="choose among the best with this sum of probability")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT.

    Raises:
        MissingFileError: the checkpoint is missing.
        UserError: the recipe does not fit this job, an argument is out of its range, the address cannot be
            listened on, or a package is missing.
    """
    if args.name is not None:
        check_unicode(args.name, "--name")
    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
    defaults = Sampling(args.temperature, top_p=args.top_p)
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the package {package} is missing: pip install 'megavlm[serve]'")
    recipe, checkpoint, tokenizer = model_of(args)
    name = args.name or name_of(args.checkpoint)
    bound = _bind(args.host, args.port) if int(os.environ.get("RANK", "0")) == 0 else None
    from megavlm.parallel.device import prepare_device  # noqa: PLC0415 - imports torch

    prepare_device()
    from megavlm.inference.session import session  # noqa: PLC0415 - imports Megatron-Core

    with session(recipe, checkpoint, tokenizer, args.context) as model, _ending_together():
        if bound is None:
            # torchrun and terminals signal every process; rank 0 lets these go when its answers are given.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            model.follow()
        else:
            with model.leading(), _ending_together():
                _lead(args, name, checkpoint, model, limits, defaults, bound)
    return 0


def _lead(
    args: argparse.Namespace,
    name: str,
    checkpoint: Path,
    model: Session,
    limits: Limits,
    defaults: Sampling,
    bound: socket.socket,
) -> None:
    """Answer until SIGTERM or SIGINT, on rank 0.

    Raises:
        UserError: something else has begun to listen there.
    """
    from megavlm.inference.server.app import Service, make_app  # noqa: PLC0415 - optional packages
    from megavlm.inference.server.worker import Worker  # noqa: PLC0415

    worker = Worker(model, limits.batch, limits.slots, limits.drain)
    service = Service(name, model, worker, limits, defaults, args.allow_remote_images)
    app = make_app(service)
    if args.web:
        from megavlm.inference.server.about import about_checkpoint, has_box_tokens  # noqa: PLC0415
        from megavlm.inference.server.web import add_page  # noqa: PLC0415

        add_page(app, service, about_checkpoint(checkpoint, model.recipe.model, has_box_tokens(service)))
    with _listening(bound, args.host, args.port), _http(app, bound, limits):
        signal.signal(signal.SIGTERM, lambda *_: worker.stop())
        signal.signal(signal.SIGINT, lambda *_: worker.stop())
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
        host, port = bound.getsockname()[:2]
        logger.info("serving %s on http://%s:%d", name, f"[{host}]" if ":" in host else host, port)
        try:
            worker.run()
        except UserError as error:  # of the model's work, not of the command line
            raise RuntimeError(f"the model cannot go on: {error}") from error
    logger.info("stopped after %d answers", worker.answered)


def _end_with(parent: int) -> None:
    """Stop when torchrun was killed, which then ends nobody."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """End this process with a line where another one of the job is gone: what is left of the model cannot answer."""
    from megavlm.parallel.state import is_lost_peer  # noqa: PLC0415 - imports Megatron-Core

    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        if is_lost_peer(error):
            logger.error("another process of this job is gone, and with it a part of the model: the server ends")
        else:
            logger.exception("the model cannot go on: the server ends")
        logging.shutdown()
        # Leaving the process groups in order would wait for the others, which torchrun ends.
        os._exit(1)


def name_of(path: Path) -> str:
    """Return the name of the run's directory that a checkpoint lies in, or is."""
    path = path.resolve()
    if path.name.startswith("step-"):
        path = path.parent
    name = path.parent.name if path.name == "checkpoints" else path.name
    return name.encode("utf-8", "replace").decode("utf-8")  # a directory's name may be no text


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address; clients are refused until the model is there.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        raise _taken(host, port, error) from None
    return bound


@contextlib.contextmanager
def _listening(bound: socket.socket, host: str, port: int) -> Iterator[None]:
    """Listen during the block.

    Raises:
        UserError: another process has begun to.
    """
    try:
        bound.listen(128)
    except OSError as error:
        raise _taken(host, port, error) from None
    with bound:
        yield


def _taken(host: str, port: int, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"--host {host} --port {port}: cannot listen there: {reason}")


class _http:  # noqa: N801 - a context
    """Serve on a thread while the block runs.

    Args:
        app: the application.
        listening: socket.
        limits: of the server.

    Raises:
        RuntimeError: it does not begin.
    """

    def __init__(self, app: object, listening: socket.socket, limits: Limits) -> None:
        import uvicorn  # noqa: PLC0415 - optional

        from megavlm.inference.server.connections import guarded  # noqa: PLC0415

        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            http=guarded(limits.connections, limits.seconds),
            ws="none",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=3,
            timeout_keep_alive=min(15, limits.seconds),
            server_header=False,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listening],), name="http", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()
        while not self.server.started:
            if not self.thread.is_alive():
                raise RuntimeError("the HTTP server did not begin")
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)

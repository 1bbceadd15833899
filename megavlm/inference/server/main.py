"""``megavlm serve``: a checkpoint behind OpenAI's chat completions, and a web page."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import socket
import threading
from dataclasses import fields
from pathlib import Path

from megavlm.inference.checkpoint import add_model_arguments, model_of
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.limits import Limits
from megavlm.parallel.device import prepare_device

logger = logging.getLogger(__name__)

_HELP = {
    "batch": "requests answered together",
    "queue": "requests that may wait beside them; more get 503",
    "body_mib": "largest request, and largest remote picture, in MiB; larger ones get 413",
    "images": "pictures of one request",
    "pixels": "pixels of one picture",
    "seconds": "time in which a request, and a remote picture, must arrive",
    "new_tokens": "longest answer where a request does not say",
}


INTERMIXED = True
"""Overrides may stand after options."""


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
        FileNotFoundError: the checkpoint is missing.
        ValueError: the recipe does not fit this job, an argument is out of its range, the address cannot be
            listened on, or a package is missing.
    """
    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
    defaults = Sampling(args.temperature, top_p=args.top_p)
    for package, extra in (("fastapi", "serve"), ("uvicorn", "serve"), *([("nicegui", "web")] if args.web else [])):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the package {package} is missing: pip install 'megavlm[{extra}]'")
    recipe, checkpoint, tokenizer = model_of(args)
    name = args.name or _name(args.checkpoint)
    listening = _listen(args.host, args.port) if int(os.environ.get("RANK", "0")) == 0 else None
    prepare_device()
    from megavlm.inference.session import session  # noqa: PLC0415 - imports Megatron-Core

    with session(recipe, checkpoint, tokenizer, args.context) as model:
        if listening is None:
            # torchrun and terminals signal every process; rank 0 lets these go when its answers are given.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            model.follow()
            return 0
        from megavlm.inference.server.app import Service, make_app  # noqa: PLC0415
        from megavlm.inference.server.worker import Worker  # noqa: PLC0415

        worker = Worker(model, limits.batch, limits.slots)
        service = Service(name, model, worker, limits, defaults, args.allow_remote_images)
        app = make_app(service)
        if args.web:
            from megavlm.inference.server.web import add_page  # noqa: PLC0415 - optional packages

            add_page(app, service)
        with model.leading():
            try:
                with _http(app, listening):
                    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
                    signal.signal(signal.SIGINT, lambda *_: worker.stop())
                    host, port = listening.getsockname()[:2]
                    logger.info("serving %s on http://%s:%d", name, f"[{host}]" if ":" in host else host, port)
                    worker.run()
            except Exception:
                logger.exception("the model cannot go on")
                logging.shutdown()
                # The other ranks may be in the middle of an answer and hear no farewell; torchrun ends them.
                os._exit(1)
            logger.info("stopped after %d answers", worker.answered)
    return 0


def _name(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if path.name.startswith("step-") else path.name


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--host {host} --port {port}: cannot listen there: {reason}") from None


class _http:  # noqa: N801 - a context
    """Serve on a thread while the block runs.

    Args:
        app: the application.
        listening: socket.
    """

    def __init__(self, app: object, listening: socket.socket) -> None:
        import uvicorn  # noqa: PLC0415 - optional

        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=3,
            timeout_keep_alive=15,
            server_header=False,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listening],), name="http", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)

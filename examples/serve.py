# SPDX-License-Identifier: BSD-3-Clause
"""Serves a text classifier over HTTP, accelerated: POST /predict, GET /health, GET /metrics.

The model is what text_classification.py keeps, or any folder of AutoModelForSequenceClassification with its tokenizer.
Texts that wait together are computed together, without padding, in one process for each NUMA node.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

try:
    import torch
    import uvicorn
    import workers
    from checkpoint import StopSignals
    from classifier import Classifier
    from command_line import exit_code, number
    from errors import CheckpointError
    from service import Meters, Service, create_app
except ModuleNotFoundError as error:
    sys.exit(f"This example needs {error.name}: pip install 'resnorm_ext[serve]'")

MODEL = Path("build/text_classification/accelerated/model")


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return exit_code("serve", lambda: serve(options, arguments))


def serve(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if options.socket is not None:
        return serve_here(options, socket.socket(fileno=options.socket))
    if not options.model.is_dir():
        raise CheckpointError(f"there is no folder {options.model}: python examples/text_classification.py makes one")
    sets = workers.cpu_sets(workers.numa_nodes(), options.processes)
    with bind(options.host, options.port) as listening:
        if len(sets) == 1:
            return serve_here(options, listening)
        return workers.run_each([sys.executable, __file__, *arguments], listening, sets)


def bind(host: str, port: int) -> socket.socket:
    """Not listening yet: until a model is loaded, clients are to find nobody there."""
    with _naming(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Without its protocol asyncio sets no TCP_NODELAY, and an answer waits 40 ms for an acknowledgement.
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    return listening


@contextmanager
def _naming(host: str, port: int) -> Iterator[None]:
    """Says in an error which address cannot be had: another program may also take it while the model is loaded."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise OSError(f"cannot serve at {host}, port {port}: {getattr(error, 'strerror', error)}") from error


def serve_here(options: argparse.Namespace, listening: socket.socket) -> int:
    """Until a signal: then what was accepted is answered."""
    # uvicorn raises the signals that end it again, for the handlers that were there before.
    with StopSignals() as stop:
        meters = Meters()
        service = Service(Classifier(options.model, options.stock, options.dtype), options, meters)
        config = uvicorn.Config(
            create_app(service, options, meters),
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=options.grace,
        )
        if stop.received is None:
            _Server(config, service, options.parent).run([listening])
    return 0


class _Server(uvicorn.Server):
    """uvicorn, which tells the service that it stops. A worker stops too where the process that started it is gone."""

    def __init__(self, config: uvicorn.Config, service: Service, parent: int | None) -> None:
        super().__init__(config)
        self._service, self._parent = service, parent

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        host, port = sockets[0].getsockname()[:2]
        with _naming(host, port):
            await super().startup(sockets)
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"Serving at {address}, process {os.getpid()}, {torch.get_num_threads()} threads", flush=True)

    async def on_tick(self, counter: int) -> bool:
        if self._parent not in (None, os.getppid()):
            self.handle_exit(signal.SIGTERM, None)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.stopping = True
        super().handle_exit(sig, frame)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, 1)
    add("--model", type=Path, default=MODEL, metavar="DIR", help=f"default: {MODEL}")
    add("--stock", action="store_true", help="the model as it comes, to compare")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is by autocast")
    add("--host", default="127.0.0.1", help="an address or name of this machine (default: 127.0.0.1)")
    add("--port", type=number(int, 0, 65535), default=8000, help="0 for any that is free (default: 8000)")
    add("--processes", type=count, metavar="N", help="default: one for each NUMA node")
    add("--max-batch-tokens", type=count, default=4096, metavar="N", help="of all texts of a batch (default: 4096)")
    add("--queue", type=count, default=1024, metavar="N", help="texts that may wait in a process (default: 1024)")
    add("--max-texts", type=count, default=64, metavar="N", help="of a request (default: 64)")
    add("--max-characters", type=count, default=100_000, metavar="N", help="of a request's texts (default: 100000)")
    add("--max-body", type=count, default=2**20, metavar="BYTES", help="of a request (default: 1 MiB)")
    add("--grace", type=count, default=8, metavar="SECONDS", help="to answer what is accepted at a stop (default: 8)")
    add("--socket", type=int, help=argparse.SUPPRESS)  # a worker's, which it inherits,
    add("--parent", type=int, help=argparse.SUPPRESS)  # and the process that started it
    options = parser.parse_args(arguments)
    if options.queue < options.max_texts:
        parser.error(f"--queue {options.queue} has no room for a request with --max-texts {options.max_texts}")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

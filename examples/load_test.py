# SPDX-License-Identifier: BSD-3-Clause
"""Loads serve.py on this machine, with the model as it comes and accelerated: throughput and latency of both.

Both services run, each in a process of its own, and are asked in turn, for some seconds each. A client sends a text,
waits for its answer, and sends the next one. Every answer is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

try:
    import psutil
    import sentiment_data
    from checkpoint import StopSignals
    from command_line import exit_code, number
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"This example needs {error.name}: pip install 'resnorm_ext[examples,serve]'")

from resnorm_ext.build.jit import cache_directory

DTYPES = ("float32", "bfloat16")


class LoadError(OSError):
    """A service does not start, or gives an answer that it should not."""


@dataclass
class Round:
    """Seconds of a round, of its requests, and of CPU that the service and the clients took."""

    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    service_cpu: float = 0.0
    client_cpu: float = 0.0

    def percentile(self, share: int) -> float:
        return sorted(self.latencies)[math.ceil(share / 100 * len(self.latencies)) - 1]


@dataclass
class Variant:
    """A service, what it has said of the texts, by their numbers, and what that took."""

    name: str
    port: int
    process: psutil.Process
    texts: Iterator[tuple[int, str]]
    labels: dict[int, str] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)

    def median(self, value: Callable[[Round], float]) -> float:
        return statistics.median(map(value, self.rounds))


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    return exit_code("load_test", lambda: load_both(options))


def load_both(options: argparse.Namespace) -> int:
    archive = options.data or sentiment_data.fetch(cache_directory())
    texts = [example.text for example in sentiment_data.split(sentiment_data.read(archive))[1]]
    console = Console()
    with ExitStack() as services:
        # So that services which are starting end with this program.
        services.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("two services start", total=2 * options.rounds)
            variants = [
                services.enter_context(start(name, more, options, texts))
                for name, more in (
                    (f"stock, {options.stock_dtype}", ["--stock", "--dtype", options.stock_dtype]),
                    (f"accelerated, {options.dtype}", ["--dtype", options.dtype]),
                )
            ]
            with StopSignals() as stop:
                for variant in variants * options.rounds:
                    progress.update(task, description=variant.name)
                    asyncio.run(load(variant, options, stop))
                    if stop.received is not None:
                        return 128 + stop.received
                    progress.advance(task)
    console.print(comparison(variants, options), agreement(variants), highlight=False)
    return 0


@contextmanager
def start(name: str, more: Sequence[str], options: argparse.Namespace, texts: Sequence[str]) -> Iterator[Variant]:
    """A service, which ends with the block."""
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), "--port", "0", "--processes", "1", *more]
    if options.model is not None:
        command += ["--model", str(options.model)]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        line = service.stdout.readline()
        address = re.match(r"Serving at http://[\d.]+:(\d+),", line)
        if address is None:
            raise LoadError(f"the service ({name}) does not start: exit code {service.wait()}")
        yield Variant(name, int(address[1]), psutil.Process(service.pid), cycle(enumerate(texts)))
    finally:
        service.terminate()
        service.communicate()


async def load(variant: Variant, options: argparse.Namespace, stop: StopSignals) -> None:
    """A round of ``options.seconds``, in which every client sends one request at least."""
    round_ = Round()
    began, service_cpu, client_cpu = time.perf_counter(), cpu_seconds(variant.process), time.process_time()

    def goes_on() -> bool:
        return stop.received is None and time.perf_counter() - began < options.seconds

    clients = [asyncio.ensure_future(client(variant, round_, goes_on)) for _ in range(options.clients)]
    try:
        await asyncio.gather(*clients)
    except (OSError, asyncio.IncompleteReadError) as error:
        for each in clients:
            each.cancel()
        raise LoadError(f"the service ({variant.name}) failed: {error}") from error
    round_.seconds = time.perf_counter() - began
    round_.service_cpu = cpu_seconds(variant.process) - service_cpu
    round_.client_cpu = time.process_time() - client_cpu
    variant.rounds.append(round_)


async def client(variant: Variant, round_: Round, goes_on: Callable[[], bool]) -> None:
    """One connection. These few lines of HTTP take 0.1 ms of CPU a request, httpx 1.7, which would be the service's."""
    reader, writer = await asyncio.open_connection("127.0.0.1", variant.port)
    try:
        while True:
            index, text = next(variant.texts)
            body = json.dumps({"texts": [text]}).encode()
            began = time.perf_counter()
            writer.write(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            answer = await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1]))
            round_.latencies.append(time.perf_counter() - began)
            if not head.startswith("http/1.1 200 "):
                raise LoadError(f"expected status 200, but got {head.splitlines()[0]} {answer[:200].decode()}")
            (prediction,) = json.loads(answer)["predictions"]
            variant.labels[index] = prediction["label"]
            if not goes_on():
                return
    finally:
        writer.close()


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def comparison(variants: Sequence[Variant], options: argparse.Namespace) -> Table:
    """A column for each variant, and the last one's share of the first's."""
    table = Table(f"{options.clients} clients", *(variant.name for variant in variants), "second / first")

    def row(name: str, form: str, value: Callable[[Round], float]) -> None:
        values = [variant.median(value) for variant in variants]
        table.add_row(name, *map(form.format, values), f"{values[-1] / values[0]:.2f}×" if values[0] else "")

    row("texts per second", "{:,.0f}", lambda each: len(each.latencies) / each.seconds)
    row("median latency, ms", "{:.1f}", lambda each: 1000 * each.percentile(50))
    row("99th percentile, ms", "{:.1f}", lambda each: 1000 * each.percentile(99))
    row("service's CPU, ms a text", "{:.2f}", lambda each: 1000 * each.service_cpu / len(each.latencies))
    row("clients' CPU, ms a text", "{:.2f}", lambda each: 1000 * each.client_cpu / len(each.latencies))
    return table


def agreement(variants: Sequence[Variant]) -> str:
    first, last = (variant.labels for variant in variants)
    both = first.keys() & last.keys()
    same = sum(first[index] == last[index] for index in both)
    return f"{same:,} of {len(both):,} texts that both were sent have the same label ({same / len(both):.2%})."


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, 1)
    add("--model", type=Path, metavar="DIR", help="default: serve.py's")
    add("--dtype", choices=DTYPES, default="float32", help="of the accelerated service; bfloat16 is by autocast")
    add("--stock-dtype", choices=DTYPES, default="float32", help="of the other one")
    add("--clients", type=count, default=16, help="default: 16")
    add("--seconds", type=number(float, 0, 600), default=5.0, help="of a round (default: 5)")
    add("--rounds", type=number(int, 1, 100), default=3, help="of each service; medians are shown (default: 3)")
    add("--data", type=Path, metavar="FILE", help="the texts' archive (default: pip fetches it, once)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

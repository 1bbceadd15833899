"""Throughput and waiting of a running ``megavlm serve`` (or of any server of OpenAI's chat completions).

``python benchmarks/serve.py http://127.0.0.1:8000 --clients 1 2 4 8``: so many clients ask at once, each again as soon
as it has its answer, through OpenAI's own client, streaming. Tokens are the server's own count. Prints a Markdown
table; the first token's wait holds the queue, the pictures and the prompt.
"""

from __future__ import annotations

import argparse
import base64
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai


@dataclass(frozen=True)
class Answered:
    """One request."""

    first_s: float
    """Seconds to the first text."""
    whole_s: float
    """Seconds to the last."""
    tokens: int


def ask(client: openai.OpenAI, model: str, content: list[dict[str, Any]], new_tokens: int, seed: int) -> Answered:
    """Ask once."""
    began = time.monotonic()
    first = tokens = 0.0
    events = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=new_tokens, temperature=1.0, seed=seed,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    for event in events:
        if not first and any(choice.delta.content for choice in event.choices):
            first = time.monotonic() - began
        if event.usage:
            tokens = event.usage.completion_tokens
    return Answered(first, time.monotonic() - began, int(tokens))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, without /v1")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8], help="how many ask at once")
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--prompt", default="Tell me a story about a red disc.")
    parser.add_argument("--image", type=Path, help="a picture that each request shows")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key="none", timeout=600)
    try:
        model = next(iter(client.models.list())).id
    except openai.APIConnectionError:
        parser.error(f"{args.url}: no server answers there; start megavlm serve first")
    content: list[dict[str, Any]] = [{"type": "text", "text": args.prompt}]
    if args.image is not None:
        data = base64.b64encode(args.image.read_bytes()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    ask(client, model, content, 2, 0)
    lines = [
        "| clients | tokens/s | first token, s (median) | whole answer, s (median) | tokens |",
        "|---|---|---|---|---|",
    ]
    for clients in args.clients:
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            seeds = range(clients * args.requests)
            said = list(pool.map(lambda seed: ask(client, model, content, args.new_tokens, seed), seeds))
        seconds, tokens = time.monotonic() - began, sum(one.tokens for one in said)
        first = statistics.median(one.first_s for one in said)
        whole = statistics.median(one.whole_s for one in said)
        lines.append(f"| {clients} | {tokens / seconds:.0f} | {first:.2f} | {whole:.2f} | {tokens} |")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

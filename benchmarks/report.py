"""Measures how large a report is, and how fast it opens in a browser.

    python benchmarks/report.py [--layers 24 --width 2048 --vocab 32000 --opens 20]

It invents a study of 24 layers of 2,048 neurons (by default), writes its report, and opens the file
in headless Chromium. The page's own clock (performance.now) measures the time until the claims and
the list of neurons are shown, the time until the plots are drawn, and the time from choosing a
neuron to seeing its card. The chosen neurons are spread over all layers, so that each of them
unpacks its own chunk. Sorting and searching are measured over all neurons.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.web.browser import chromium
from tests.web.studies import Invention
from topk_megatron.web.report import ReportConfig, write_report

_TIMES = """() => ({
  first: performance.getEntriesByName('first-view')[0].startTime,
  plots: performance.getEntriesByName('plots')[0].startTime,
})"""
_CHANGE = """([id, value, event]) => {
  const element = document.getElementById(id);
  const began = performance.now();
  element.value = value;
  element.dispatchEvent(new Event(event, {bubbles: true, cancelable: true}));
  return performance.now() - began;
}"""


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--opens", type=int, default=20, help="number of cards to open")
    parser.add_argument("--loads", type=int, default=3, help="how often to open the file")
    return parser.parse_args()


def measure(path: Path, args: argparse.Namespace) -> dict[str, float]:
    """Returns the median milliseconds of each step, and those of the slowest card."""
    first, plots, cards = [], [], []
    with chromium() as browser:
        page: Any = None
        for load in range(args.loads):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"file://{path}")
            page.wait_for_selector("html[data-ready=all]", timeout=120_000)
            times = page.evaluate(_TIMES)
            first.append(times["first"])
            plots.append(times["plots"])
            if load < args.loads - 1:
                page.close()
        sort = page.evaluate(_CHANGE, ["sort", "token_entropy", "change"])
        page.evaluate("document.getElementById('search').value = 'word12 token_entropy<4'")
        search = page.evaluate(_CHANGE, ["order", "up", "change"])
        total = args.layers * args.width
        for number in range(args.opens):
            neuron = number * total // args.opens
            layer, index = divmod(neuron, args.width)
            page.evaluate(f"location.hash = '#L{layer}N{index}'")
            page.wait_for_selector(f"#card[data-neuron='{neuron}']")
        cards = page.evaluate("performance.getEntriesByName('card').map((one) => one.duration)")
    return {
        "first_view_ms": statistics.median(first),
        "plots_ms": statistics.median(plots),
        "card_ms": statistics.median(cards),
        "card_slowest_ms": max(cards),
        "sort_ms": sort,
        "search_ms": search,
    }


def main() -> None:
    """Prints one line of JSON."""
    args = parse()
    with tempfile.TemporaryDirectory() as directory:
        study = Path(directory)
        Invention(study, args.layers, args.width, args.vocab).record().entropy().track().steer()
        began = time.monotonic()
        path = study / "report.html"
        write_report(ReportConfig(study, path))
        seconds = time.monotonic() - began
        found = measure(path, args)
        size = path.stat().st_size
    facts = {"layers": args.layers, "width": args.width, "megabytes": size / 1e6}
    load = {"write_seconds": seconds, "load_average": os.getloadavg()[0]}
    print(json.dumps({k: round(v, 1) for k, v in {**facts, **load, **found}.items()}))


if __name__ == "__main__":
    main()

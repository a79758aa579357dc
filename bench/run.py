"""Runs the benchmarks one after the other, prints their tables and bars, and writes everything as JSON to bench/results/.

    python bench/run.py [--quick] [NAME]...

Nothing else should run on the machine meanwhile. Every figure is a ratio or a median over rounds that alternate between the systems
compared, so a busy minute hits them alike; still, read a miss by a hair as noise and run it again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Coordinators of benchmarks keep no answers unless a benchmark says so: most of them ask the same again and again.
os.environ.setdefault("ARCHIPELAG_CACHE", "off")

from bench import bars
from node.hardware import usable_cpus, usable_ram_bytes

NAMES = (
    "streams",
    "gossip",
    "echo_http",
    "chat",
    "prefill",
    "splice",
    "pipeline",
    "pipeline_exact",
    "placement",
    "books",
    "books_chat",
    "direct",
    "blobs",
    "cargos",
    "market_day",
    "batch",
    "cache",
    "cache_quality",
    "workflows",
    "ab_simulation",
    "ab_assignment",
)
_RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": model,
        "cores": usable_cpus(),
        "ram_gib": round(usable_ram_bytes() / 1024**3),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; the figures are rougher")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    results = {"date": time.strftime("%Y-%m-%d"), "quick": arguments.quick, "machine": machine(), "benchmarks": {}}
    print(f"on {results['machine']['cpu']}, {results['machine']['cores']} cores, {results['date']}", flush=True)
    for name in arguments.names or NAMES:
        results["benchmarks"][name] = _run(name, arguments.quick)
    _RESULTS.mkdir(exist_ok=True)
    file = _RESULTS / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json"
    file.write_text(json.dumps(results, indent=1))
    every = [bar for result in results["benchmarks"].values() for bar in result["bars"]]
    print("\n| bar | measured | limit | met |\n|---|---|---|---|", *bars.markdown(every), sep="\n")
    print(f"\n{sum(bar['met'] for bar in every)} of {len(every)} bars met; all figures are in {file}")
    return 0


def _run(name: str, quick: bool) -> dict[str, Any]:
    started = time.monotonic()
    print(f"\n== {name} ==", flush=True)
    module = importlib.import_module(f"bench.{name}")
    result: dict[str, Any] = module.run(quick)
    print(module.table(result), *bars.lines(result["bars"]), sep="\n")
    print(f"({time.monotonic() - started:.0f} s)", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())

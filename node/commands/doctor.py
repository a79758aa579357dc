"""Check this machine and installation: what an Island would offer, what is missing, and the command that brings it.

Exit status 0 when an Island can run, 1 when something must be repaired first.
"""

from __future__ import annotations

import argparse

from node.commands.common import add_data_dir, settled
from node.settings import defaults

HELP = "check this machine and installation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser, "island")
    parser.add_argument("--coordinator", metavar="ADDRESS", help="also try to reach this Coordinator")


def run(arguments: argparse.Namespace) -> int:
    settings = defaults(settled(arguments, "island"), coordinator="")
    from node.doctor import examine

    findings = examine(settings.data_dir, settings.coordinator)
    for finding in findings:
        print(finding)
    return 1 if any(finding.state == "fail" for finding in findings) else 0

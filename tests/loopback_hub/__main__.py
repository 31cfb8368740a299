"""A loopback Hub as a process: `python -m tests.loopback_hub [--port N]` prints {endpoint, admin_token} as JSON."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading

from tests.loopback_hub.server import describe, serve
from tests.loopback_hub.state import HubState


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.loopback_hub", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port of the Hub; 0 takes a free one")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started this one")
    options = parser.parse_args()
    state = HubState()
    running = serve(state, options.port)
    print(describe(state, running), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        if options.until_stdin_closes:
            sys.stdin.read()
        else:
            threading.Event().wait()
    running.close()


if __name__ == "__main__":
    main()

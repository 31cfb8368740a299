"""How worker processes are started: forked off a server that has imported everything once, where the system can.

A fork of the simulator itself would inherit locks of threads that it does not have. Nothing here imports torch, so that
the server can be started first and imports while the simulator does.
"""

import multiprocessing

_PRELOADED = "fedfstq_hf.simulation.preloaded"


def start_method() -> str:
    """The name of the start method for `multiprocessing.get_context`."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def warm_up() -> None:
    """Start the server that workers are forked off; it imports in the background. Again, or elsewhere: nothing."""
    if start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.set_forkserver_preload([_PRELOADED])
        forkserver.ensure_running()

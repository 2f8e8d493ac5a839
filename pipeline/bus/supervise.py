"""Run by `broker` as a process of its own: keeps a nats-server, and ends it with its starter.

    python -I -S supervise.py STARTER_PID SCRATCH_DIR COMMAND…

It ends the server when its standard input says so (a byte, or the end), or when its own parent is
no longer STARTER_PID, which the kernel sees to even after a SIGKILL; then it removes SCRATCH_DIR.
The end of input alone would not do: a forked child of the starter keeps the pipe open. A server
that ends by itself leaves its exit status in SCRATCH_DIR/exit. Uses nothing but the standard
library, and nothing that is slow to import.
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable

POLL_S = 0.1
TERM_S = 3.0
PR_SET_PDEATHSIG = 1


def main(starter: int, scratch: str, command: list[str]) -> int:
    """Run `command` until the starter says stop or is gone."""
    stop = False

    def on_term(_signal: int, _frame: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_dying_with_us())
    told = False
    while not stop and os.getppid() == starter:
        readable, _, _ = select.select([0], [], [], POLL_S)
        if readable:
            break
        if not told and server.poll() is not None:
            told = True
            with open(os.path.join(scratch, "exit"), "w") as file:
                file.write(str(server.returncode))
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(TERM_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
    _remove(scratch)
    return 0


def _dying_with_us() -> Callable[[], object] | None:
    """On Linux: have the kernel kill the server should this supervisor itself be killed.

    That follows the thread that forked, which is the only one here.
    """
    if sys.platform != "linux":
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _remove(folder: str) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))

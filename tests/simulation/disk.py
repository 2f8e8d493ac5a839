"""A simulated disk: real files, on which threads take virtual time and meet what disks do.

The directory tier of the log is the real one, down to its bytes; only its threads are replaced. A
read or a write happens at one moment of virtual time, after a while; it finds the disk full, gone
or hanging, or a file that is no longer what was written.
"""

import asyncio
import errno
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .loop import Process, VirtualLoop

#: In memory where that can be had: nothing here has to outlive a real machine.
MEMORY = Path("/dev/shm")
#: In the name of every simulated disk: the trace leaves it out.
MARK = "simulated-disk-"


class Disk:
    """One disk that all processes of a run have mounted."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        place = MEMORY if MEMORY.is_dir() else None
        self._home = Path(tempfile.mkdtemp(prefix=MARK, dir=place))
        self.root = self._home / "log"
        self.root.mkdir()
        self.loop = loop
        self.rng = rng
        self.full = False
        self._lost = 0
        self._unhung: asyncio.Event | None = None
        self._halves = 0

    def threads(self, process: Process) -> Callable[[str, int], "SimThreads"]:
        """What makes the threads of one process."""
        return lambda name, at_once: SimThreads(self, process, name, at_once)

    # ---- what happens to it

    def lose(self) -> None:
        """It is no longer mounted."""
        self._lost += 1
        if self.root.exists():
            self.root.rename(self._home / "away")

    def find(self) -> None:
        """It is mounted again."""
        self._lost -= 1
        if not self._lost:
            (self._home / "away").rename(self.root)

    def hang(self) -> None:
        """Nothing that it is asked for returns, until release()."""
        if self._unhung is None:
            self._unhung = asyncio.Event()

    def release(self) -> None:
        """It answers again, those as well who have waited."""
        if self._unhung is not None:
            self._unhung.set()
            self._unhung = None

    def heal(self) -> None:
        """Nothing is wrong with it any more; what was damaged stays so."""
        self.full = False
        self.release()
        if self._lost:
            self._lost = 1
            self.find()

    def damage(self, where: float) -> bool:
        """Flip a bit of a file, or cut it off; whether there was one."""
        files = sorted(self.root.glob("*/*.safetensors"))
        if not files:
            return False
        file = files[int(where * len(files))]
        data = bytearray(file.read_bytes())
        at = self.rng.randrange(len(data))
        if self.rng.random() < 0.3:
            del data[at:]
        else:
            data[at] ^= 1 << self.rng.randrange(8)
        # A file of its own, whose stamp nobody knows: two writes may be within one tick of time.
        other = file.with_suffix(".other")
        other.write_bytes(data)
        other.replace(file)
        return True

    def leave_half(self) -> None:
        """A writer has died: what it has written of a file stays."""
        for folder in sorted(self.root.glob("*")):
            self._halves += 1
            (folder / f".half-{self._halves}.tmp").write_bytes(b"half a file")

    def close(self) -> None:
        """The run is over."""
        shutil.rmtree(self._home, ignore_errors=True)

    async def wait(self, mean_s: float) -> None:
        """Take the time of one access."""
        await asyncio.sleep(self.rng.expovariate(1 / mean_s))
        while self._unhung is not None:
            await self._unhung.wait()


class SimThreads:
    """Stands for the threads of pipeline/log/threads.py, in virtual time."""

    def __init__(self, disk: Disk, process: Process, name: str, at_once: int) -> None:
        self._disk = disk
        self._writes = name.endswith("write")
        self._places = asyncio.Semaphore(at_once)
        self._busy = 0
        process.on_exit.append(self._ended)

    async def run(self, function: Callable[[Callable[[], None]], Any], *, timeout_s: float) -> Any:
        """Its result, or TimeoutError; it also waits for a place."""
        async with asyncio.timeout(timeout_s):
            await self._places.acquire()
            # A thread that hangs keeps its place, whether it is waited for or not.
            access = asyncio.ensure_future(self._disk.wait(0.004 if self._writes else 0.001))
            self._busy += 1
            access.add_done_callback(self._done)
            await asyncio.shield(access)
        return function(self._go_on)

    def _go_on(self) -> None:
        if self._writes and self._disk.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _done(self, _access: asyncio.Future[None]) -> None:
        self._busy -= 1
        self._places.release()

    def _ended(self) -> None:
        if self._writes and self._busy:
            self._disk.leave_half()

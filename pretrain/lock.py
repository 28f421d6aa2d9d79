"""One training at a time in a run's folder: two would overwrite each other's checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

_PATIENCE_S = 90.0  # what is left of a training that was killed ends within a minute
_POLL_S = 0.5
_HELD = (errno.EACCES, errno.EAGAIN)
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def hold_run(run: Path, console: IO[str], patience_s: float = _PATIENCE_S) -> IO[str]:
    """Take RUN/lock for as long as the returned file is open, which a killed process's is not.

    Called by rank 0. Raises ValueError, naming the holder, where another training has it and does not end soon.
    """
    file = open(run / "lock", "a+")  # noqa: SIM115 - the caller closes it
    deadline, is_told = time.monotonic() + patience_s, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _UNKNOWN:
                print(f"warning: the file system of {run} has no locks: start nothing else there", file=console)
                return file
            if error.errno not in _HELD:
                raise
        file.seek(0)
        holder = file.read().strip() or "another process"
        if time.monotonic() > deadline:
            file.close()
            raise ValueError(f"{run}: is being trained by {holder}; wait for it, end it, or choose another folder")
        if not is_told:
            print(f"waiting for {holder} to leave {run}", file=console, flush=True)
            is_told = True
        time.sleep(_POLL_S)
    file.truncate(0)
    job = f" (Slurm job {os.environ['SLURM_JOB_ID']})" if "SLURM_JOB_ID" in os.environ else ""
    print(f"process {os.getpid()} on {socket.gethostname()}{job}", file=file, flush=True)
    return file

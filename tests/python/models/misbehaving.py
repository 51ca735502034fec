"""A process that does what its tasks are called; it imports nothing that takes long."""

import os
import signal
import time


def serve(pipe, greeting):
    """Say what a task asks for, or hang, or die."""
    pipe.send(None)
    while True:
        task = pipe.recv()
        pipe.send(("before", greeting))
        if task.startswith("hangs"):
            time.sleep(600)
        if task.startswith("leaves"):
            os._exit(3)
        if task.startswith("crashes"):
            os.kill(os.getpid(), signal.SIGKILL)
        pipe.send(("after", task))
        pipe.send(None)


def never_ready(_pipe):
    """End before anything is said."""
    os._exit(4)

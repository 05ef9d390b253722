"""Process beside a driver that sends a run to one tracker: `python -m elmo_ray.trackers RUN TRACKER NAME`.

It ends when the driver writes `finished`, `stopped` or `failed` to its stdin, or is gone. Lines on its stdout are for
the driver's log if they begin with INFO, WARNING or REASON; a REASON says why it could not send everything.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

from elmo_ray.storage.files import file_lock
from elmo_ray.trackers.beside import LAST_S
from elmo_ray.trackers.sender import Sender, TrackerError, lock_path

LOOK_EVERY_S, TRY_AGAIN_S = 1.0, 5.0


def main(run_dir: str, tracker: str, name: str) -> int:
    """Send until the driver ends; return 0 if everything was sent."""
    ended, outcomes = threading.Event(), ["failed"]

    def listen() -> None:
        outcomes.append(sys.stdin.readline().strip() or "failed")
        ended.set()
        # the driver waits no longer either, and may be gone
        clock = threading.Timer(LAST_S, os._exit, [3])
        clock.daemon = True
        clock.start()

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(10)  # training needs the cores more
    with file_lock(lock_path(Path(run_dir), tracker), wait=True):  # an earlier process may still be at its end
        sender, is_away, shown = Sender(Path(run_dir), tracker, name), False, ""
        while True:
            over = ended.wait(TRY_AGAIN_S if is_away else LOOK_EVERY_S)
            try:
                count = sender.send()
                if shown != sender.shown_at:
                    shown = sender.shown_at
                    _say(f"INFO {tracker}: {shown}")
                if is_away:
                    _say(f"INFO {tracker}: answers, and {count:,} records are sent")
                is_away = False
                if over:
                    sender.close(outcomes[-1])
                    return 0
            except TrackerError as error:
                if not is_away and not over:
                    _say(f"WARNING {error}; training goes on, and what is missing is sent later")
                is_away = True
                if over:
                    _say(f"REASON {error}")
                    return 1


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # of a driver that is gone
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""`python -m dbdist.monitor.drawing`: a request a line on stdin, a picture a line on stdout.

Started by `painter`. It ends when stdin does, so also when the process that asks is gone.
"""

import json
import os
import signal
import sys


def main() -> None:
    # These signals are for the run that asks; ignored before the slow import.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    from dbdist.monitor.figures import draw

    for line in sys.stdin:
        print(json.dumps(draw(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

"""The process of a training job, `python -m training_jobs`: `train.main` between a quick start and a quick end.

torch, MLflow and what they bring are a million objects that live as long as the process. Python's garbage collector would look
through them again and again while they are imported, and take them apart at the end: seconds of a machine that is paid for.
"""

import gc
import os
import sys

if __name__ == "__main__":
    gc.disable()
    from training_jobs import train  # not above: the collector has to be off
    from training_jobs.job import STOPPED

    gc.freeze()
    gc.enable()
    try:
        status = train.main()
    except SystemExit as left:
        if left.code != STOPPED:
            raise
        status = STOPPED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

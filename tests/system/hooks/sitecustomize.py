"""Loaded by the server's Python processes in tests: the first round's rename waits when told to.

While $SILOTUNE_TEST_SERVER/pause is there, so does the rename; $SILOTUNE_TEST_SERVER/there says so.
"""

import os
import sys
import time
from typing import Any


def wait(event: str, args: tuple[Any, ...]) -> None:
    folder = os.environ.get("SILOTUNE_TEST_SERVER")
    if event != "os.rename" or not folder or not str(args[1]).endswith("rounds/0001"):
        return
    while os.path.exists(f"{folder}/pause"):
        with open(f"{folder}/there", "w"):
            time.sleep(0.02)


sys.addaudithook(wait)

"""A worker with a child that knows its id, as vLLM's engine does. STANDIN says what goes wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

fault = os.environ.get("STANDIN", "")
number = os.environ["FLEXKV_CONFIG_PATH"].removesuffix(".json")[-1]
if fault == f"crash{number}":
    sys.stderr.write("the model is broken\n")
    sys.exit(3)
if fault == f"usage{number}":
    sys.exit(2)
worker_id = random.getrandbits(63)
child = subprocess.Popen(
    [sys.executable, "-c", "import time\ntime.sleep(600)"],
    env=os.environ | {"DYN_FPM_WORKER_ID": str(worker_id)},
)
sys.stderr.write(f"child {child.pid}\n")
model = sys.argv[sys.argv.index("--served-model-name") + 1]
record = Path(os.environ["DYN_FILE_KV"]) / f"{os.getpid()}.worker"
draft = record.with_suffix(".new")
draft.write_text(json.dumps({"worker_id": worker_id, "model": model}))
draft.rename(record)


def leave(*_: object) -> None:
    record.unlink()
    child.kill()
    sys.exit(0)


signal.signal(signal.SIGTERM, signal.SIG_IGN if fault == f"deaf{number}" else leave)
while True:
    time.sleep(600)

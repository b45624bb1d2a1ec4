"""Answers /health and /v1/models from the records of the workers."""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(os.environ["DYN_FILE_KV"])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        records = [json.loads(path.read_text()) for path in FOLDER.glob("*.worker")]
        address = {"namespace": "dynamo", "component": "backend", "endpoint": "generate"}
        known = [address | {"instance_id": record["worker_id"]} for record in records]
        models = [{"id": record["model"]} for record in records]
        answer = {"instances": known} if self.path == "/health" else {"data": models}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


port = int(sys.argv[sys.argv.index("--http-port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()

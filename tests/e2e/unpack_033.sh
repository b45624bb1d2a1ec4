#!/bin/bash
# unpack_033.sh VENV FOLDER: the Python files of vLLM 0.33 in FOLDER, for the environment VENV (of 0.32).
# There is no build of it for CPUs; what the scheduler needs is Python only.
set -euo pipefail

[[ -n "${2:-}" ]] || { echo "usage: $0 VENV FOLDER" >&2; exit 2; }
venv=$1 folder=$2
[[ ! -e "$folder/vllm" ]] || exit 0

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$venv/bin/python" -m pip download -q --no-deps -d "$wheels" vllm==0.33.0
mkdir -p "$folder.new"
"$venv/bin/python" - "$wheels"/vllm-*.whl "$folder.new" <<'PYTHON'
import sys
from zipfile import ZipFile

with ZipFile(sys.argv[1]) as wheel:
    wheel.extractall(sys.argv[2], [n for n in wheel.namelist() if n.endswith((".py", ".json"))])
PYTHON
mv "$folder.new" "$folder"

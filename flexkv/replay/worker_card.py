"""A program: one Dynamo worker with a model card and nothing behind it, so that a router lists it.

Prints its worker id as one line of JSON when it is registered, and ends when its input closes: it
can't outlive whoever started it. ``flexkv.replay.deployment.FakeWorker`` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
_MODEL_FILES: dict[str, Any] = {
    "config.json": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    },
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 8192,
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    },
    "tokenizer.json": {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": _SPECIAL, "unk_token": "<unk>"},
    },
}


def write_model(folder: Path) -> None:
    """Write what ``register_model`` wants to see of a model: no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _MODEL_FILES.items():
        (folder / name).write_text(json.dumps(content))


async def _no_answer(request: Any, context: Any) -> AsyncIterator[Any]:
    del request, context  # their names are the protocol
    yield {"token_ids": [2], "finish_reason": "stop"}


async def _input_closed() -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


async def _serve(
    endpoint_path: str, tokens_per_block: int, model: Path, num_ranks: int, zmq: str | None
) -> None:
    from dynamo.llm import (  # noqa: PLC0415  # the `demo` extra, needed by this program alone
        KvEventPublisher,
        ModelInput,
        ModelRuntimeConfig,
        ModelType,
        WorkerType,
        register_model,
    )
    from dynamo.runtime import DistributedRuntime  # noqa: PLC0415  # as above

    backend = os.environ.get("DYN_DISCOVERY_BACKEND", "file")
    runtime = DistributedRuntime(asyncio.get_running_loop(), backend, "tcp", event_plane="nats")
    endpoint = runtime.endpoint(endpoint_path)
    card = ModelRuntimeConfig()
    card.total_kv_blocks = 1000
    card.data_parallel_size = num_ranks
    card.max_num_seqs = 64
    card.max_num_batched_tokens = 8192
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat | ModelType.Completions,
        endpoint,
        str(model),
        model.name,
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=tokens_per_block,
        runtime_config=card,
        self_host_metadata=False,
    )
    relay = None
    if zmq is not None:  # as a vLLM worker that has KV events of its own
        relay = KvEventPublisher(
            endpoint,
            kv_block_size=tokens_per_block,
            dp_rank=0,
            enable_local_indexer=True,
            zmq_endpoint=zmq,
            zmq_topic="",
        )
    serving = endpoint.serve_endpoint(_no_answer, graceful_shutdown=False)
    print(json.dumps({"worker_id": endpoint.connection_id()}), flush=True)  # noqa: T201  # the protocol
    await _input_closed()
    if relay is not None:
        relay.shutdown()
    runtime.shutdown()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(serving, 2)


def main() -> None:
    """Register one worker and wait for the end of the input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoint", help="namespace.component.endpoint")
    parser.add_argument("tokens_per_block", type=int)
    parser.add_argument("model", type=Path, help="folder for the model's files")
    parser.add_argument("num_ranks", type=int, help="data-parallel ranks")
    parser.add_argument("--zmq", help="where vLLM's event stream is to be relayed from")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    write_model(arguments.model)
    asyncio.run(
        _serve(
            arguments.endpoint,
            arguments.tokens_per_block,
            arguments.model,
            arguments.num_ranks,
            arguments.zmq,
        )
    )


if __name__ == "__main__":
    main()

"""Tiny models whose greedy output depends on every byte of the KV cache, and prompts for them."""

from __future__ import annotations

import json
import os
import random
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

VOCABULARY = 512
HIDDEN = 128
LAYERS = 4
HEADS = 4
KV_HEADS = 2
HEAD = 32
INNER = 256
LATENT, ROPE, NOPE = 512, 64, 32  # the only sizes of MLA that vLLM has a CPU kernel for

KINDS = ("llama", "qwen2", "mla")
NUM_NEW_TOKENS = 48

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_OF_KIND: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": HEAD},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "mla": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_key_value_heads": HEADS,
        "q_lora_rank": None,
        "kv_lora_rank": LATENT,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": NOPE,
        "v_head_dim": HEAD,
        "first_k_dense_replace": LAYERS,
        "moe_layer_freq": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": INNER,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
}
_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "model_max_length": 4096,
    "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "assistant:",
}


def make_model(folder: Path, kind: str) -> Path:
    """The folder of the model ``kind`` below ``folder``, made if it is not there yet."""
    done = folder / kind
    if done.exists():
        return done
    draft = folder / f"{kind}.{os.getpid()}"
    draft.mkdir(parents=True)
    _write(draft / "config.json", _BASE | _OF_KIND[kind])
    _write(draft / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write(draft / "tokenizer_config.json", _TOKENIZER)
    _make_tokenizer(draft / "tokenizer.json")
    _make_weights(draft / "model.safetensors", kind)
    try:
        draft.rename(done)
    except OSError:  # another process was faster
        shutil.rmtree(draft)
    return done


def prompts(seed: int = 0, *, num_prompts: int = 12) -> list[list[int]]:
    """Token ids: 180 to 528 each, over three prefixes that they share."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(3, VOCABULARY) for _ in range(n)] for n in (160, 256, 384)]
    return [
        prefixes[i % 3] + [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(20, 144))]
        for i in range(num_prompts)
    ]


def lone_prompts(tokens_per_block: int, *, num_prompts: int = 12) -> list[list[int]]:
    """Prompts of whole blocks that share nothing."""
    rng = random.Random(1)
    lengths = [rng.randrange(8, 30) * tokens_per_block for _ in range(num_prompts)]
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def _make_tokenizer(path: Path) -> None:
    from tokenizers import (  # noqa: PLC0415  # only in vLLM's environment
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    tokenizer.save(str(path))


def _make_weights(path: Path, kind: str) -> None:
    import torch  # noqa: PLC0415  # seconds, and only the first test needs it
    from safetensors.torch import save_file  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)

    # wide enough that the logits are not flat
    def drawn(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    weights = {
        "model.embed_tokens.weight": drawn(VOCABULARY, HIDDEN, std=1.0),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": drawn(VOCABULARY, HIDDEN, std=0.3),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape, std in _shapes(kind):
            weights[prefix + name] = drawn(*shape, std=std) if std else torch.ones(*shape)
    save_file(weights, str(path), metadata={"format": "pt"})


def _shapes(kind: str) -> list[tuple[str, tuple[int, ...], float]]:
    """Of one layer: name, shape, standard deviation (0: all ones)."""
    shapes: list[tuple[str, tuple[int, ...], float]] = [
        ("input_layernorm.weight", (HIDDEN,), 0),
        ("post_attention_layernorm.weight", (HIDDEN,), 0),
        ("mlp.gate_proj.weight", (INNER, HIDDEN), 0.1),
        ("mlp.up_proj.weight", (INNER, HIDDEN), 0.1),
        ("mlp.down_proj.weight", (HIDDEN, INNER), 0.1),
        ("self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD), 0.15),
    ]
    if kind == "mla":
        return [
            *shapes,
            ("self_attn.q_proj.weight", (HEADS * (NOPE + ROPE), HIDDEN), 0.15),
            ("self_attn.kv_a_proj_with_mqa.weight", (LATENT + ROPE, HIDDEN), 0.15),
            ("self_attn.kv_a_layernorm.weight", (LATENT,), 0),
            ("self_attn.kv_b_proj.weight", (HEADS * (NOPE + HEAD), LATENT), 0.08),
        ]
    for name, num_heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        shapes.append((f"self_attn.{name}_proj.weight", (num_heads * HEAD, HIDDEN), 0.15))
        if kind == "qwen2":
            shapes.append((f"self_attn.{name}_proj.bias", (num_heads * HEAD,), 0.08))
    return shapes

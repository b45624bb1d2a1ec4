"""A model whose steps cost more than what surrounds them, and that a CPU still serves."""

from __future__ import annotations

MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}

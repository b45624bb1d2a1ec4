"""Keeps the KV cache of LLM servers alive beyond the GPU, and tells routers the truth about it."""

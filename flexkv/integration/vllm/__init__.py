"""The KV connector for vLLM 0.31 to 0.33."""

"""Where flexkv meets the programs that it serves."""

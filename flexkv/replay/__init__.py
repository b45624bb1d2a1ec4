"""Replays real and made-up traffic through engines and a real router."""

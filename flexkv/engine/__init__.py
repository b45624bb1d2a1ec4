"""Decides what is where, and moves bytes: index, eviction, planner, transfers, engine."""

"""Checks an installation and a running deployment, and says what to do about each finding."""

"""What every test shares: how hard Hypothesis tries."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadline: the machine is shared, and the time of one example says nothing about the code.
settings.register_profile("quick", deadline=None, max_examples=50, print_blob=True)
settings.register_profile(
    "nightly", deadline=None, max_examples=2000, stateful_step_count=50, print_blob=True
)
settings.load_profile(os.environ.get("FLEXKV_HYPOTHESIS", "quick"))

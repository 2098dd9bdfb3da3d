"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# Machines that test are shared: time says nothing there, and the first example imports torch.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

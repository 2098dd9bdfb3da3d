"""For all tests."""

from __future__ import annotations

from hypothesis import settings

from arctic_like.engine.op_locks import remove_stale_locks

# Machines that test are shared: time says nothing there, and the first example imports torch.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

# A run that was killed, here or before, may have left one; what loads DeepSpeed itself would wait for ever.
remove_stale_locks()

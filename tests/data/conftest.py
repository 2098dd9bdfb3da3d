"""Two busy cores make deadlines flicker; what must be fast is timed on its own."""

from hypothesis import settings

settings.register_profile("data", deadline=None, max_examples=60)
settings.load_profile("data")

"""Settings of all tests."""

from hypothesis import settings

# The same examples in every run: a failure is a finding about the code, never about the day.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

"""How long a test waits for something that must happen: so long that only a hang fails, on any machine.

A test that passes never waits for it to end. What takes its time from the clock, such as a benchmark, gets a clock of
the test's own.
"""

PATIENCE = 240.0
"""Seconds for one answer, event, log line or exit. pytest's own limit for a test is longer."""

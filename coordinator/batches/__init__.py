"""Batches: many inputs in one call, worked through on many Islands at once, in spite of Islands and Coordinators that go away."""

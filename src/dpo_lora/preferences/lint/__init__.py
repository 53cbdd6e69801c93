"""Faults of preference data: what they are, how they are found, counted, shown, and when they stop a run."""

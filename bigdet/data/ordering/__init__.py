"""Which samples are in which group: pure functions of the index, numpy only."""

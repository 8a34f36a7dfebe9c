"""The options of a run: schema, loading, rules."""

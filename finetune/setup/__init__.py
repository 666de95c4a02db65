"""Everything before the first step."""

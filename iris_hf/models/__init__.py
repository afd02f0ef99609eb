"""Models: what images they take, their steps, where they come from, how they are stored."""

"""One file a stage: its networks and what happens in a step; `Stage` does what surrounds it."""

"""Training loops, their histories, and the digits that the demo learns."""

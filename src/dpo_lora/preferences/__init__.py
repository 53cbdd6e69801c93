"""Where pairs come from and what they must be: sources, contract, split, tokens."""

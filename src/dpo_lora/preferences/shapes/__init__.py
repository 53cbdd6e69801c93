"""From rows in the shapes found in the wild to pairs of prompt, chosen and rejected."""

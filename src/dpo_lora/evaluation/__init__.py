"""What a policy is worth: exact scores of held-out pairs and the statistics to read them by."""

"""What happens to a finished adapter."""

"""What Hydra finds of dpo-lora's sweeps. Imported by every command that composes, so it imports nothing heavy."""

"""Held-out metrics that can choose a checkpoint. Imports nothing: the rules between settings read it."""

HIGHER_IS_BETTER = {
    "eval/accuracy": True,
    "eval/accuracy_length_controlled": True,
    "eval/margin": True,
    "eval/loss": False,
    "eval/brier": False,
    "eval/calibration_error": False,
}

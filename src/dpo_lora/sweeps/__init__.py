"""Many runs as one: trials named by what they compute, each in its own process, told apart honestly."""

"""Where pairs come from and what they must be.

sources/ reads rows, shapes/ turns them into pairs, tokens makes them what is trained, store keeps
that by content, lint/ looks for faults in it, split parts training from held-out, and pairs is the
door: data settings in, sound pairs out.
"""

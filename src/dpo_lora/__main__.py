"""Console script ``dpo-lora``: hands train and plan to Hydra at once, everything else to the command table.

The table is imported only when it is asked: a mistyped override is answered in under a second.
"""

from __future__ import annotations

import os
import select
import sys

_PIPE_CLOSED = 141  # what a shell reports of a command that SIGPIPE ended
_LAUNCHER = ("hydra/launcher=", "hydra.launcher.")  # a plan runs on none


def main() -> None:
    """Run the command that sys.argv names."""
    try:
        _command()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # as of `dpo-lora plan --help | head`
        if not _reader_has_left():
            raise
        sys.exit(_PIPE_CLOSED)


def _reader_has_left() -> bool:
    """Whether nobody reads stdout any more; what it still holds is dropped then."""
    if sys.stdout is None:
        return False
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)  # errors are told unasked
    if not watch.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _command() -> None:
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command == "train":
        _hydra(arguments)
    elif command == "plan":
        words = [w for w in arguments if w not in ("-m", "--multirun") and not w.lstrip("+").startswith(_LAUNCHER)]
        _hydra([*words, "hydra/launcher=plan", "-m"])
    elif command in ("-sc", "--shell-completion"):
        from dpo_lora import cli

        cli.complete([command, *arguments])
    else:
        from dpo_lora import cli

        cli.run_table()


def _hydra(words: list[str]) -> None:
    from dpo_lora.train import main as train

    train(words)


if __name__ == "__main__":
    main()

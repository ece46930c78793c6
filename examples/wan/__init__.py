"""The parts of ``examples/wan_finetune.py``."""

__all__ = ["Refused"]


class Refused(ValueError):
    """What a user asked for cannot be done; the text says what is accepted."""

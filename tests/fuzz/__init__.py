"""Damaged files for every reader of darktrt: ``make fuzz SECONDS=600``, or ``python -m fuzz`` in the folder ``tests``."""

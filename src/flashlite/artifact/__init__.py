"""The artifact on disk: its format, and how it is written, read and verified."""

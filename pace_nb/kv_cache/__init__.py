"""Storage of keys and values between steps: one protocol (base.py), one file per kind."""

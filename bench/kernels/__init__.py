"""One bench per kernel file: the share of a limit measured in the same process."""

"""The command line: one file per verb, found by `main.py`.

Knows arguments, terminals and exit codes; does not know how text is made.
"""

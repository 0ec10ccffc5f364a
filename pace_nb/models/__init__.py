"""Model families, one readable file each, and how a checkpoint becomes one of them.

`registry.py` picks the family, `loader.py` reads the files, `config_json.py` reads the
configuration.
"""

"""How the embedded world was made: `python -m stepdistill.tiny.make`."""

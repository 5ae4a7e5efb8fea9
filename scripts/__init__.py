"""Commands around the three root ones: `python -m scripts.<name> --help`."""

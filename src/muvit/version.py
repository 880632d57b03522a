"""The version of the package; apart from its public names, which import everything."""

__version__ = "0.2.0"

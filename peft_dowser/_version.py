"""The version of the package, which saved adapters carry."""

__version__ = "0.1.0"

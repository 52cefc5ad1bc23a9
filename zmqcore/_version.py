"""The one place that states the version: packaging, the package and the command line read it here."""

__version__ = "0.1.0"

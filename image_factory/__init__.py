"""Build golden Linux images with the distributions' own network installers."""

__version__ = "2.0.0"

"""Packaging: pip install image-factory."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "image_factory/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)
assert VERSION is not None

setup(
    name="image-factory",
    version=VERSION[1],
    description="Build golden Linux images with the distributions' own network installers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="ISC",
    python_requires=">=3.11",
    packages=find_packages(include=["image_factory", "image_factory.*"]),
    scripts=["image-factory"],
    # The helper is data: the first line of a script would be changed, and -I lost.
    data_files=[
        ("bin", ["image-factory-sudo-helper"]),
        (
            "share/image-factory",
            [*sorted(str(path.relative_to(HERE)) for path in (HERE / "data").iterdir()), "contrib/disk-image-create"],
        ),
    ],
    # Through a proxy, httplib2 needs pysocks, which its newer versions don't bring.
    install_requires=["httplib2", "jinja2", "pyparted", "pysocks", "pyyaml", "rich"],
)

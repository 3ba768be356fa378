# Debian's own Python, which has Debian's packages (pyparted among them); another may come first on PATH.
PYTHON ?= /usr/bin/python3
PREFIX ?= /usr/local
DESTDIR ?=

VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' image_factory/__init__.py)
MANUALS := image-factory.1 image-factory-sudo-helper.1
TARBALL := image-factory-$(VERSION).tar.xz
PACKAGE := $(DESTDIR)$(PREFIX)/share/image-factory

all: doc

# Install the Debian packages that a target needs; nothing happens where they are there.
packages-%:
	tests/install-packages $*

# Tools that Debian 12 doesn't have, or has too old.
.venv/bin/ruff: tests/requirements.txt | packages-check
	$(PYTHON) -m venv --system-site-packages .venv
	.venv/bin/pip install --quiet --requirement tests/requirements.txt
	touch $@

check: packages-check .venv/bin/ruff lint
	tests/run-tests

lint: .venv/bin/ruff
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# What make check has no time for of the table of faults.
faults: packages-check
	tests/run-tests -m slow_faults

demo: packages-demo
	tests/demo

bench: packages-bench
	tests/bench
	tests/run-tests tests/bench_fleet.py -s

# MIRROR: URL of a Debian mirror as the guest sees it; LINUX, INITRD: the installer's kernel and initrd.
acceptance: packages-acceptance
	tests/acceptance

acceptance-failures acceptance-bios acceptance-uefi acceptance-hybrid: packages-acceptance
	ONLY=$(@:acceptance-%=%) tests/acceptance

doc: $(MANUALS)

%.1: %.1.md image_factory/__init__.py
	pandoc --standalone --to man --variable footer="image-factory $(VERSION)" $< --output $@

install: doc
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1 $(PACKAGE)
	install -m 755 image-factory image-factory-sudo-helper $(DESTDIR)$(PREFIX)/bin
	install -m 644 $(MANUALS) $(DESTDIR)$(PREFIX)/share/man/man1
	for directory in image_factory image_factory/outputs image_factory/sources; do \
		install -d $(PACKAGE)/$$directory && install -m 644 $$directory/*.py $(PACKAGE)/$$directory || exit 1; \
	done
	install -m 644 data/* $(PACKAGE)

dist: $(TARBALL)

# What is committed, with the times of the commit: made twice, it is the same.
$(TARBALL): .FORCE
	git archive --format tar --prefix image-factory-$(VERSION)/ HEAD | xz -9 > $@

version:
	@echo $(VERSION)

clean:
	rm -rf $(MANUALS) image-factory-*.tar.xz .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.FORCE:
.PHONY: all check lint faults demo bench acceptance acceptance-failures acceptance-bios acceptance-uefi acceptance-hybrid doc install dist version clean .FORCE

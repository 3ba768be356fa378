# Debian's own Python, which has Debian's packages (pyparted among them); another may come first on PATH.
PYTHON ?= /usr/bin/python3
PREFIX ?= /usr/local
DESTDIR ?=

VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' image_factory/__init__.py)
MANUALS := image-factory.1 image-factory-sudo-helper.1
COMPLETION := image-factory.bash-completion
TARBALL := image-factory-$(VERSION).tar.xz
PACKAGE := $(DESTDIR)$(PREFIX)/share/image-factory
COMPLETIONS := $(DESTDIR)$(PREFIX)/share/bash-completion/completions

# What a program that is missing was to write is not there.
.DELETE_ON_ERROR:

all: doc $(COMPLETION)

# $(call need,PROGRAM,PACKAGE) says what to install for targets that install nothing themselves.
need = @command -v $(1) >/dev/null || { echo 'make: $(1) is missing: apt-get install $(2)' >&2; exit 1; }

# Install the Debian packages that a target needs; nothing happens where they are there.
packages-%:
	tests/install-packages $*

# Tools that Debian 12 doesn't have, or has too old.
.venv/bin/ruff: tests/requirements.txt | packages-check
	$(PYTHON) -m venv --system-site-packages .venv
	.venv/bin/pip install --quiet --requirement tests/requirements.txt
	touch $@

check: packages-check .venv/bin/ruff lint lint-groovy
	tests/run-tests

# The tests that need neither root nor a machine, a kernel or the network.
check-unit: packages-unit
	PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m pytest -p no:cacheprovider --numprocesses auto --quiet tests/unit

lint: .venv/bin/ruff
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# The Jenkinsfile. npm's own packages are of the versions that it finds.
GROOVY_LINT_VERSION := 18.0.0
GROOVY_LINT := .venv/groovy-lint-$(GROOVY_LINT_VERSION)

$(GROOVY_LINT)/package.json: .venv/bin/ruff
	.venv/bin/npm install --loglevel error --prefix $(GROOVY_LINT) npm-groovy-lint@$(GROOVY_LINT_VERSION)
	touch $@

# Linting takes half a minute, so it is done where the file, its rules or the linter have changed.
$(GROOVY_LINT)/passed: contrib/jenkins/Jenkinsfile contrib/jenkins/.groovylintrc.json $(GROOVY_LINT)/package.json
	.venv/bin/node $(GROOVY_LINT)/node_modules/.bin/npm-groovy-lint \
		--noserver --loglevel warning --failon warning --path contrib/jenkins --files Jenkinsfile
	touch $@

lint-groovy: $(GROOVY_LINT)/passed

# What make check has no time for of the table of faults.
faults: packages-check
	tests/run-tests -m slow_faults

# MIRROR: URL of another mirror of Debian.
demo: packages-demo
	tests/programs/demo

# The stand-in of an installer, in a machine of libvirt's.
demo-installer: packages-demo-installer
	tests/programs/demo installer

# See tests/programs/bench_bootstrap.py.
BUILDER = build/diskimage-builder

# What an image from packages is measured against.
$(BUILDER)/bin/disk-image-create:
	python3 -m venv $(BUILDER)
	$(BUILDER)/bin/pip install --quiet diskimage-builder

bench: packages-bench $(BUILDER)/bin/disk-image-create
	tests/programs/bench
	tests/run-tests tests/programs/bench_fleet.py tests/programs/bench_bootstrap.py \
		tests/programs/bench_outputs.py tests/programs/bench_elements.py -s

# Elements against diskimage-builder itself.
elements-check: packages-check $(BUILDER)/bin/disk-image-create
	tests/run-tests tests/programs/elements_check.py

# MIRROR: URL of a Debian mirror as the guest sees it; LINUX, INITRD: the installer's kernel and initrd.
acceptance: packages-acceptance
	tests/programs/acceptance

acceptance-failures acceptance-bios acceptance-uefi acceptance-hybrid: packages-acceptance
	ONLY=$(@:acceptance-%=%) tests/programs/acceptance

doc: $(MANUALS)

%.1: %.1.md image_factory/__init__.py
	$(call need,pandoc,pandoc)
	pandoc --standalone --to man --variable footer="image-factory $(VERSION)" $< --output $@

$(COMPLETION):
	$(call need,register-python-argcomplete,python3-argcomplete)
	register-python-argcomplete image-factory > $@

install: doc $(COMPLETION)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1 $(COMPLETIONS) $(PACKAGE)
	install -m 755 image-factory image-factory-sudo-helper $(DESTDIR)$(PREFIX)/bin
	install -m 644 $(MANUALS) $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 644 $(COMPLETION) $(COMPLETIONS)/image-factory
	for directory in $$(find image_factory -name '*.py' -printf '%h\n' | sort --unique); do \
		install -d $(PACKAGE)/$$directory && install -m 644 $$directory/*.py $(PACKAGE)/$$directory || exit 1; \
	done
	install -m 644 data/* $(PACKAGE)
	install -m 755 contrib/disk-image-create $(PACKAGE)
	@# A user who can't write there would have all of it compiled at each start; a package does that itself.
	[ -n "$(DESTDIR)" ] || $(PYTHON) -m compileall -q $(PACKAGE)

dist: $(TARBALL)

# What is committed, with the times of the commit: made twice, it is the same.
$(TARBALL): .FORCE
	$(call need,git,git)
	$(call need,xz,xz-utils)
	@# Of a pipe, make sees how the last program has ended.
	git archive --format tar --prefix image-factory-$(VERSION)/ --output $@.new HEAD || { rm -f $@.new; exit 1; }
	xz -9 < $@.new > $@ && rm $@.new

# The Debian package, in the directory above.
deb: packages-deb
	@[ -w .. ] || { echo "make: the package's directory $$(dirname "$$PWD") is not writable" >&2; exit 1; }
	dpkg-buildpackage --unsigned-source --unsigned-changes

# The package on Debian 12 and 13, in chroots: built, checked by lintian, used by autopkgtest and piuparts.
package-check: packages-package-check
	tests/programs/package-check

version:
	@echo $(VERSION)

clean:
	rm -rf $(MANUALS) $(COMPLETION) image-factory-*.tar.xz .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.FORCE:
.PHONY: all check check-unit lint lint-groovy faults demo demo-installer bench elements-check acceptance acceptance-failures acceptance-bios acceptance-uefi acceptance-hybrid doc install dist deb package-check version clean .FORCE

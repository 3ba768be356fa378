"""Whether the servers that a build talks to can be reached: mirrors, the guest's too, and upload targets."""

import re
from collections.abc import Iterator

from .base.errors import BuildError, ConfigurationError
from .base.log import logger, masked
from .downloads import fetch
from .model import Plan
from .sources import SOURCES
from .uploads import UPLOADS

# In QEMU's user network this machine has that address.
_HOST = re.compile(r"(?<=://)10\.0\.2\.2(?=[:/]|$)")


def check(plan: Plan) -> None:
    """Ask each server, and log an error for each that does not serve; ConfigurationError if there is one."""
    problems = [problem for problem in _problems(plan) if problem]
    for problem in problems:
        logger.error("%s", problem)
    if problems:
        raise ConfigurationError(f"[{plan.image}] {len(problems)} of what it needs from elsewhere can't be had.")


def _problems(plan: Plan) -> Iterator[str | None]:
    """Give what is wrong with each place in one line, None where nothing is."""
    source = SOURCES[plan.settings.source]
    for key, uri, is_file in source.remote(plan):
        yield _problem(plan, key, uri, fetch.Probe(is_file=is_file))
    urls = source.urls_of_guest(plan)
    # Behind a proxy of its own, only that knows what the guest can reach; and it answers what it likes.
    for key, url in ({"proxy": urls["proxy"]} if "proxy" in urls else urls).items():
        # The guest knows nothing of this machine's proxy.
        probe = fetch.Probe(any_answer=key == "proxy", direct=True)
        yield _problem(plan, key, _HOST.sub("127.0.0.1", url), probe, said=url)
    for destination in {each.section: each for found in plan.destinations.values() for each in found}.values():
        try:
            if UPLOADS[destination.type].probe(destination, plan.output_dir):
                logger.info("[%s] upload-target: %s can be reached.", destination.section, destination.target)
            yield None
        except BuildError as error:
            yield f"[{destination.section}] upload-target: {destination.target}: {error.message}"


def _problem(plan: Plan, key: str, uri: str, probe: fetch.Probe, said: str | None = None) -> str | None:
    try:
        fetch.probe(uri, probe)
    except BuildError as error:
        reason = error.message.removeprefix(f"Can't fetch {uri}: ")
        return f"[{plan.image}] {key}: {masked(said or uri)}: {reason}"
    logger.info("[%s] %s: %s can be reached.", plan.image, key, said or uri)
    return None

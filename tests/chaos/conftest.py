"""Fixtures of the chaos tests: one site for all of them, which is made anew once it is not well."""

import contextlib
from collections.abc import AsyncIterator

import pytest_asyncio

from .site import Site


class Sites:
    """The site that the tests use, one after the other: to start one takes longer than most."""

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        self._site: Site | None = None

    async def take(self) -> Site:
        """A site where all is well and the trainer publishes."""
        site = self._site
        if site is not None:
            try:
                await site.settle()
                site.check()
            except (AssertionError, TimeoutError):
                site = None  # it was told by the test that has left it so
                await self.close()
        if site is None:
            site = self._site = await self._stack.enter_async_context(Site())
            await site.start()
        site.run()
        return site

    async def close(self) -> None:
        await self._stack.aclose()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def sites() -> AsyncIterator[Sites]:
    """Where the site comes from."""
    sites = Sites()
    yield sites
    await sites.close()


@pytest_asyncio.fixture(loop_scope="session")
async def site(sites: Sites) -> AsyncIterator[Site]:
    """A broker, a trainer that publishes and two workers; at the end nobody was ever wrong."""
    site = await sites.take()
    yield site
    site.check()

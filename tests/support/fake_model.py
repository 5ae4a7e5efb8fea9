"""A model in the place of a server, for tests of whatever asks one: complete() is each test's own."""


class FakeModel:
    """Knows nothing; a subclass says how it completes a prompt."""

    api, retries = "completions", 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        pass

    async def check(self):
        return "a fake model"

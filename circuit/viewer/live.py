"""Work with a run's model while the page is looked at."""

from starlette.routing import Route

from .runs import Runs


class Live:
    def __init__(self, runs: Runs):
        self.found = runs

    def routes(self) -> list[Route]:
        return []

    def close(self) -> None:
        pass

"""A pytest plugin for mutants: which tests run and in what order, for how long, and what each reaches."""

import functools
import signal
import sys
import time

import coverage
import pytest
from hypothesis import Phase, settings

CACHED = type(functools.cache(len))
EXAMPLES = 30  # of hypothesis, the same each time and not made smaller


class Choice:
    """A pytest plugin: keeps the chosen tests, quickest first, and measures what it is asked to."""

    def __init__(
        self, seconds: dict[str, float] | None = None, tracer: coverage.Coverage | None = None, patience=0.0
    ):
        self.chosen, self.tracer, self.patience = seconds, tracer, patience
        self.set_alarm(0.0)
        self.seconds, self.failed = {}, []
        self.uses = {}  # a test's wide fixtures and cached helpers count as its own
        self.caches, self.context = [], ""

    def set_alarm(self, usual: float) -> None:
        """End this process by SIGALRM where something takes far longer than usual [s]."""
        if self.patience:
            signal.setitimer(signal.ITIMER_REAL, self.patience + 10 * usual)

    def switch(self, context: str) -> None:
        """Put the lines that follow to a test or a fixture."""
        self.context = context
        self.tracer.switch_context(context)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        """Drop what is not chosen, order the rest, and keep hypothesis brief."""
        if self.chosen is not None:
            items[:] = [i for i in items if i.nodeid in self.chosen] or items
            items.sort(key=lambda i: self.chosen.get(i.nodeid, 0.0))
        for item in items:
            if now := getattr(item.obj, "_hypothesis_internal_use_settings", None):
                brief = settings(
                    now, max_examples=min(EXAMPLES, now.max_examples), derandomize=True, database=None,
                    phases=[Phase.explicit, Phase.generate],
                )  # fmt: skip
                getattr(item.obj, "__func__", item.obj)._hypothesis_internal_use_settings = brief
        self.uses = {i.nodeid: {f"fixture {name}" for name in i.fixturenames} for i in items}
        mine = [m for name, m in sys.modules.items() if name.startswith(("lora2qlora", "test_"))]
        self.caches = [o for m in mine for o in vars(m).values() if isinstance(o, CACHED)]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        """Measured, a test starts without what others have cached, and its lines are put to its name."""
        if self.tracer:
            for cached in self.caches:
                cached.cache_clear()
            self.switch(item.nodeid)
        self.set_alarm((self.chosen or {}).get(item.nodeid, 0.0))
        start = time.perf_counter()
        yield
        self.seconds[item.nodeid] = time.perf_counter() - start

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        """Lines of a fixture that tests share belong to all of them."""
        before = self.context
        if self.tracer and fixturedef.scope != "function":
            self.switch(f"fixture {fixturedef.argname}")
        yield
        if self.context != before:
            self.switch(before)

    def pytest_runtest_logreport(self, report):
        """Remember what failed."""
        if report.failed:
            self.failed.append(report.nodeid)

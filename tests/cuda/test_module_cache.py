"""Kernels on a device within a budget of bytes, with a driver that only keeps books: see NOTE [Unloading kernels]."""

import gc

import pytest
from wengert import _C

cuda = _C.cuda


class Driver:
    """Modules and events are numbers; a launch that has not ended keeps the events behind it from passing."""

    def __init__(self):
        self.next = 1
        self.loaded = {}  # module: image
        self.pending = {}  # event: (device, stream)
        self.busy, self.capturing = set(), set()
        self.loads = 0

    def new(self):
        self.next += 1
        return self.next

    def load(self, image, entry):
        assert entry == "entry"
        self.loads += 1
        if image == b"bad":
            return 0
        module = self.new()
        self.loaded[module] = image
        return module

    def unload(self, module):
        del self.loaded[module]  # once only

    def record(self, device, stream):
        if stream in self.capturing:
            return 0
        event = self.new()
        self.pending[event] = (device, stream)
        return event

    def passed(self, event):
        if self.pending[event][1] in self.busy:
            return False
        del self.pending[event]
        return True


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture
def cache(driver):
    return cuda.ModuleCache(driver, 30)


def images(driver):
    return sorted(driver.loaded.values())


def load(cache, key, stream=1, **options):
    """A launch that has been queued: nobody holds the module any more."""
    kernel = cache.load(key, bytes([key]) * 10, 0, stream, **options).kernel
    gc.collect()
    return kernel


def test_one_load_for_many_launches(cache, driver):
    assert len({load(cache, 1, stream) for stream in (1, 2, 1)}) == 1
    assert driver.loads == 1 and cache.bytes == 10


def test_the_least_recently_used_goes(cache, driver):
    for key in (1, 2, 3, 1, 4):
        load(cache, key)
    assert cache.bytes == 40, "2 is retired, and unloaded at a later load"
    load(cache, 5)
    assert b"\2" * 10 not in images(driver)
    load(cache, 1)
    assert driver.loads == 5, "1 was used again before 4"
    load(cache, 6)
    load(cache, 2)
    assert driver.loads == 7 and cache.bytes <= 50


def test_a_launch_that_has_not_ended_keeps_its_kernel(cache, driver):
    driver.busy.add(7)
    load(cache, 1, stream=7)
    load(cache, 1, stream=8)
    for key in range(2, 9):
        load(cache, key)
    assert b"\1" * 10 in images(driver)
    driver.busy.clear()
    load(cache, 9)
    assert b"\1" * 10 not in images(driver)


def test_a_kernel_that_is_about_to_be_launched_stays(cache, driver):
    held = cache.load(1, b"\1" * 10, 0, 1)
    for key in range(2, 9):
        load(cache, key)
    cache.clear()
    assert images(driver) == [b"\1" * 10]
    del held
    gc.collect()
    cache.clear()
    assert images(driver) == [] and cache.bytes == 0


@pytest.mark.parametrize("first", [True, False])
def test_what_a_graph_captured_stays_for_good(cache, driver, first):
    load(cache, 1, forever=first)
    load(cache, 1, forever=not first)
    for key in range(2, 9):
        load(cache, key)
    cache.clear()
    assert images(driver) == [b"\1" * 10] and cache.bytes == 10


def test_a_stream_that_is_being_captured_is_left_alone(cache, driver):
    load(cache, 1, stream=3)
    load(cache, 1, stream=7)
    driver.capturing.add(7)
    for key in range(2, 9):
        load(cache, key)
    assert b"\1" * 10 in images(driver)
    driver.capturing.clear()
    cache.clear()
    assert images(driver) == [] and driver.pending == {} and cache.bytes == 0


def test_a_load_that_fails_leaves_nothing(cache, driver):
    for _ in range(2):
        with pytest.raises(cuda.KernelUnavailable):
            cache.load(1, b"bad", 0, 1)
    assert driver.loads == 2 and cache.bytes == 0 and driver.loaded == {}


def test_a_kernel_larger_than_the_budget_is_run(cache, driver):
    assert cache.load(1, bytes(100), 0, 1).kernel
    assert cache.bytes == 100
    load(cache, 2)
    load(cache, 3)
    assert cache.bytes == 20

"""A process that is forked while a thread holds one of our locks can take it."""

import os
import threading
import time

import pytest

from mmkernels import masks
from mmkernels.compat import kept

LOCKS = {"masks": masks._keeping, "plans": kept.plans._lock, "by tensor": kept._by_tensor_lock}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", LOCKS)
def test_a_child_that_is_forked_while_a_thread_holds_the_lock_takes_it(name):
    lock, held = LOCKS[name], threading.Event()

    def hold():
        with lock:
            held.set()
            time.sleep(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    if (child := os.fork()) == 0:
        failed = 1
        try:
            failed = int(not lock.acquire(timeout=5))
        finally:
            os._exit(failed)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0

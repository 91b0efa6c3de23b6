"""Several processes in one group (gloo, on this machine) that call a function of a test."""

import os
import tempfile
import time
import traceback
from multiprocessing import connection, get_context

import torch.distributed as dist

CONTEXT = get_context("forkserver")  # starts clean, and imports once for all
CONTEXT.set_forkserver_preload(["lora2qlora.sharding", "transformers.models.llama.modeling_llama"])


def together(count: int, function, *arguments, seconds: float = 120) -> list:
    """What `function(*arguments)` returns in each of `count` processes, by rank; no process is left behind.

    Raises AssertionError: one raised, died, or was not done after `seconds`; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(count)]
        processes = [
            CONTEXT.Process(
                target=_work, args=(rank, count, folder, sender, function, arguments), daemon=True
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process in processes:
                process.start()
            for _, sender in pipes:
                sender.close()  # so that a dead process is the end of its pipe
            return _answers([receiver for receiver, _ in pipes], time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answers(receivers: list, end: float) -> list:
    answers = {}
    while len(answers) < len(receivers):
        waiting = [r for r in receivers if r not in answers]
        ready = connection.wait(waiting, max(0, end - time.monotonic()))
        assert ready, f"ranks {[receivers.index(r) for r in waiting]} were not done in time"
        for receiver in ready:
            try:
                good, answers[receiver] = receiver.recv()
            except EOFError:
                good, answers[receiver] = False, "it died"
            assert good, f"rank {receivers.index(receiver)}: {answers[receiver]}"
    return [answers[receiver] for receiver in receivers]


def _work(rank: int, count: int, folder: str, sender, function, arguments) -> None:
    """One process: joins the group, and sends (True, what was returned) or (False, what was raised)."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    try:
        sender.send((True, function(*arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    dist.destroy_process_group()

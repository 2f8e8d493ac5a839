"""A trainer as a user writes it: `python script.py MODEL_DIR RUN BUS`.

Publishes until SIGTERM; then says `last VERSION` on stdout once every worker has it, and leaves.
"""

import signal
import sys
import threading

import torch
from transformers import AutoModelForCausalLM

from sparsecast import BusUnavailable, Policy, Publisher, RunBusy

told = threading.Event()


def main(model_dir: str, run: str, bus: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    publisher = Publisher(model, run=run, bus=bus, dtype=torch.bfloat16, policy=Policy(lease_s=2))
    while not told.is_set():
        try:
            publisher.open()
            break
        except (RunBusy, BusUnavailable) as exc:
            print(f"waiting: {exc}", flush=True)
            told.wait(0.2)
    print(f"open {publisher.version}", flush=True)
    with publisher:
        while not told.is_set():
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter[torch.rand_like(parameter) < 0.01] += 0.5
            publisher.publish()
            told.wait(0.2)
        report = publisher.publish().wait_applied(timeout_s=30)
        print(f"last {report.version} {sorted(report.applied)} {report.missing}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

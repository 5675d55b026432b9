"""log.jsonl: what a run has measured, a JSON object a line.

    {"event": "start", ...}     the command, versions, device, and all settings: what the run could depend on
    {"event": "epoch", ...}     a record per epoch; epoch 0 is the network before training
    {"event": "resume", ...}    the run went on after an interruption, perhaps on another machine
    {"event": "end", ...}       the run has reached its end

An epoch's "std" is std x sqrt(d): 1 is scattered, 0 collapsed.

Lines are only added, so a kill can cut nothing but the last one. When a run goes on from a checkpoint, the
records after that checkpoint are dropped: those epochs are done again.
"""
import json
import math
import os
import shlex
import sys

from .. import VERSIONS
from ..common.files import refusing, replacing
from ..common.machine import device_name


class Log:
    """The records of a run: in memory on every process, since what a run does next can depend on them; in the
    file by the process that `writes`."""

    def __init__(self, path, writes):
        self.path = path
        self.writes = writes
        self.records = []

    def read(self, last_epoch):
        """Keep the records that were written before the checkpoint: no epoch after last_epoch, and no end.

        Raises Refused if the file holds no log of a run.
        """
        with refusing(self.path, "not a log of this run; restore it, or give another --out"):
            with open(self.path) as f:
                # A kill may have cut the last line.
                records = [json.loads(line) for line in f if line.endswith("}\n")]
            for record in records:
                is_early = record["event"] == "epoch" and record["epoch"] <= last_epoch
                if is_early or record["event"] in ("start", "resume"):
                    self.records.append(record)
            if self.records[0]["event"] != "start":
                raise ValueError("no start")

    def start(self, event, settings, device, **more):
        """Add a record that a run starts or goes on, and write the file with all records that are kept."""
        self.records.append({
            "event": event,
            **more,
            "command": shlex.join(sys.argv),
            "device": device_name(device),
            **VERSIONS,
            "settings": settings,
        })
        self.write()

    def write(self):
        """Write the file anew, with all records."""
        if self.writes:
            with replacing(self.path, "w") as f:
                f.writelines(json.dumps(record) + "\n" for record in self.records)

    def add(self, event, **values):
        """Add a record and return it. JSON knows no NaN: null stands for it."""
        record = {"event": event}
        for name, value in values.items():
            is_odd = isinstance(value, float) and not math.isfinite(value)
            record[name] = None if is_odd else value
        self.records.append(record)
        if not os.path.exists(self.path):  # somebody has moved the folder away
            self.write()
        elif self.writes:
            with open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")
        return record

    def epochs(self):
        """The records of epochs; that of epoch 0 is the untrained network's."""
        return [record for record in self.records if record["event"] == "epoch"]

"""A task, and a run that does it: how far it is, when it saves, and what ends it.

A run is saved at its start, at its end, after a signal, and every --save-minutes. It is also saved at the end
of an epoch, if the last save took less than a fiftieth of the time since: epochs can be as short as a second.

Saving may take all processes together, as with PerImageVectors. So process 0 looks at the clock and tells the
others: in every step, each process adds what it wants (to stop, to save) to a sum that all of them read. They
read it one step later, because reading at once would make each step wait for the GPU. The loss and the norm
of the gradient are judged one step late for the same reason, but always before anything is saved: no
checkpoint holds numbers that are not finite.
"""
import math
import os
import shutil
import signal
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..common.errors import Refused, Stopped
from ..common.files import refusing, replacing, save
from ..common.machine import OnTheirWay
from .ends import handle_signals
from .folder import FORMAT, NEWEST, PREVIOUS, check_format, compare_settings, newest_checkpoint
from .log import Log
from .processes import all_sum, check_same


class Job(NamedTuple):
    """A task: what is trained or evaluated on which images, where, and with which settings.

    settings    {name: value}, all that the result can depend on; the log and the result hold them
    device      of this process
    train, val  Sources; val may be None
    test_views  (source, batches of (epoch, indices)) -> yields (indices, images (N, 3, S, S))
    out         the folder to write to, or the file, if one is all there is to write
    resuming    whether to go on from what is in that folder
    """
    settings: dict
    device: torch.device
    train: object
    val: object
    test_views: object
    out: str
    resuming: bool


def interrupt(number, frame):
    """The second Ctrl-C: raise KeyboardInterrupt. The third ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


class Run:
    """How far a run is: `epoch` epochs are done, and `step` steps of the next.

    job         its settings are what makes the run what it is: "epochs", "batch", "seed", "save_minutes", ...
    parts       {name: model, optimiser, ...}: what a checkpoint holds, by state_dict. A "model" and an
                "optimizer" are among them. Each is equal on all processes, or gathers itself when asked for
                its state, as PerImageVectors do
    steps_per_epoch     as many as loading.index_batches yields an epoch: images // batch
    override    names of settings that may differ from the checkpoint's
    follow      names of settings that are taken from the checkpoint

    Raises Refused if the checkpoint is foreign or has other settings, or if both checkpoints are damaged.
    """

    def __init__(self, job, parts, steps_per_epoch, override=(), follow=()):
        self.out = job.out
        self.settings = job.settings
        self.device = job.device
        self.resuming = job.resuming
        self.parts = parts
        self.steps_per_epoch = steps_per_epoch
        self.first = dist.get_rank() == 0  # the process that writes files
        self.epoch = 0
        self.step = 0
        # The time that this epoch's steps have taken, how much of it went by waiting for data, and when the
        # epoch would have begun without interruptions.
        self.seconds = 0.0
        self.waited = 0.0
        self.began = time.monotonic()
        # The sums of loss and std x sqrt(d) over this epoch's steps, and their means once it is done.
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.means = None
        # When the run was last saved, how long that took, and where it was.
        self.saved = time.monotonic()
        self.saving = 0.0
        self.saved_at = None
        self.newest_is_damaged = False
        self.signal = 0                    # the number of the signal that this process got
        self.parent = os.getppid()
        self.numbers = None                # OnTheirWay: the last step's loss and gradient norm
        self.wishes = None                 # OnTheirWay: how many processes want to stop, and to save
        self.notes = []                    # lines for the screen, at the start
        self.log = Log(self.path("log.jsonl"), self.first)
        if self.resuming:
            self.resume(override, follow)

    def path(self, name):
        """A file in the run's folder."""
        return os.path.join(self.out, name)

    # --- Going on from a checkpoint ----------------------------------------------------------------------

    def resume(self, override, follow):
        """Take position and parts from the newest checkpoint that can be read, and the log up to there."""
        checkpoint, path, problem = newest_checkpoint(self.out)
        if problem:
            self.newest_is_damaged = True
            self.notes.append(f"{problem}; going on from {path}")
        with refusing(path, "doesn't fit this run"):
            check_format(checkpoint, path)
            then = checkpoint["settings"]
            self.settings.update((name, then[name]) for name in follow)
            changed = compare_settings(then, self.settings, override, path)
            if changed:
                self.notes.append(f"settings changed since then: {changed}")
            self.load_parts(checkpoint)
            self.load_position(checkpoint, path)
        position = self.position()
        check_same(f"checkpoint {path}", [position], self.device)
        self.notes.append(f"continuing after {self.epoch} epochs and {self.step} steps")
        # Epoch 0's record, of the untrained network, is written after the first checkpoint.
        self.log.read(last_epoch=self.epoch if position > 0 else -1)

    def load_parts(self, checkpoint):
        """Load the state of each part. Raises anything, if the checkpoint doesn't fit."""
        optimizer = self.parts["optimizer"]
        own = [dict(group) for group in optimizer.param_groups]
        for name, part in self.parts.items():
            part.load_state_dict(checkpoint[name])
        # The lr is the checkpoint's. Weight decay and momentum are this run's: --override may change them.
        for group, options in zip(optimizer.param_groups, own):
            group.update(options, lr=float(group["lr"]))
        for w, kept in optimizer.state.items():
            for name, t in kept.items():
                if name != "step":  # a number, which AdamW counts
                    # In the weight's layout, which is this device's: fused SGD reads both in one order.
                    kept[name] = torch.empty_like(w).copy_(t)

    def load_position(self, checkpoint, path):
        """Take the position in the run. Raises Refused if it is beyond the run's end."""
        self.epoch = checkpoint["epoch"]
        self.step = checkpoint["step"]
        self.seconds = float(checkpoint["seconds"])
        self.waited = float(checkpoint["waited"])
        self.began -= float(checkpoint["wall"])
        self.sums += torch.tensor(checkpoint["sums"], dtype=torch.float64, device=self.device)
        epochs = self.settings["epochs"]
        if self.epoch > epochs or not 0 <= self.step <= self.steps_per_epoch:
            raise Refused(f"{path}: is at epoch {self.epoch}, step {self.step}, beyond this run's {epochs} "
                          f"epochs of {self.steps_per_epoch} steps")

    def begin(self, **more):
        """Start the log and the first checkpoint; if resuming, only log that the run goes on.

        From now on the signals in STOPPING end the run, after the step that it is in.

        more: what else the log's first record holds
        """
        if self.resuming:
            self.log.start("resume", self.settings, self.device, epoch=self.epoch, step=self.step)
        else:
            self.log.start("start", self.settings, self.device, **more)
            self.save()
        handle_signals(self.on_signal)

    def on_signal(self, number, frame):
        """Remember the signal. A second Ctrl-C leaves at once, and a third whatever hangs."""
        self.signal = number
        signal.signal(signal.SIGINT, interrupt)

    def should_stop(self):
        """Whether this process got a signal, or has lost its torchrun: other signals than SIGTERM end that
        without a word to its processes."""
        return self.signal > 0 or ("TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent)

    def stopped(self):
        """What to raise once the run is saved and should stop."""
        return Stopped(self.signal or signal.SIGTERM, f"stopped by a signal after epoch {self.epoch}, step "
                       f"{self.step}; the same command with --resume goes on")

    def unless_stopped(self, features):
        """The same function, which raises Stopped if the run should stop: measuring takes minutes. The run
        is saved first."""
        if not self.is_saved():
            self.save()

        def asking(x):
            if self.should_stop():
                raise self.stopped()
            return features(x)

        return asking

    # --- An epoch ----------------------------------------------------------------------------------------

    def waiting_for(self, batches):
        """Yield the same batches, and count the time until each arrives as waiting for data."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def steps_of_epoch(self, stream):
        """Yield (step, what the stream has for it) for the steps that this epoch still needs; then save, if
        that is due.

        step counts from the start of the whole run.
        """
        began = time.monotonic() - self.seconds
        while self.step < self.steps_per_epoch:
            try:
                batch = next(stream)
            except Exception:  # a worker was killed, DATA is gone: the steps so far are good
                if self.settings["world"] == 1:
                    self.save()
                raise
            self.step += 1
            self.seconds = time.monotonic() - began
            yield self.position() - 1, batch
        self.check_numbers()
        self.means = (self.sums / self.steps_per_epoch).tolist()  # waits for the GPU, so that its time counts
        self.seconds = time.monotonic() - began
        self.save_epoch()

    def add_to_means(self, loss, std_sqrt_d=0.0):
        """Count a step's loss and std x sqrt(d), scalars that are equal on all processes, in the epoch's
        means."""
        self.sums[0] += loss
        self.sums[1] += std_sqrt_d

    def check_finite(self, loss, gradient_norm):
        """Raise Refused if the loss or the gradient of the step before was not finite."""
        self.check_numbers()
        self.numbers = OnTheirWay(torch.stack([loss.double(), gradient_norm.double()]))

    def check_numbers(self):
        """Judge the last step whose numbers have not been judged yet."""
        if self.numbers:
            loss, gradient_norm = self.numbers.read()
            self.numbers = None
            if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
                self.refuse(f"the loss, {loss}, or the gradient, of norm {gradient_norm},")

    def refuse(self, what):
        """Raise Refused because something is not finite."""
        raise Refused(f"{what} is not finite in epoch {self.epoch + 1}, by step {self.step}; the last good "
                      f"checkpoint is {self.path(NEWEST)}. Try a smaller --base-lr, in another --out")

    def save_or_stop_if_asked(self):
        """Do what any process wanted at the step before, and tell what this one wants now. Raises Stopped,
        with everything saved."""
        if self.wishes:
            stop, save_now = self.wishes.read()
            if stop or save_now:
                self.save()
            if stop:
                # Nobody leaves before the checkpoint is written: torchrun would end the others. (On a GPU
                # nothing waits for a sum until it is read.)
                all_sum(torch.zeros(1, device=self.device)).item()
                raise self.stopped()
        wishes = torch.zeros(2, device=self.device)
        wishes[0].fill_(self.should_stop())
        wishes[1].fill_(self.is_due(60 * self.settings["save_minutes"]))
        self.wishes = OnTheirWay(all_sum(wishes))

    # --- Saving ------------------------------------------------------------------------------------------

    def is_due(self, seconds):
        """Whether this process decides when to save, and the last time was longer ago."""
        return self.first and time.monotonic() - self.saved > seconds

    def is_saved(self):
        """Whether the run has been saved where it is now, by this process."""
        return self.saved_at == (self.epoch, self.step)

    def save_epoch(self):
        """At the end of an epoch: save if that is due, and keep the checkpoint if --keep-every says so."""
        number = self.epoch + 1
        every = self.settings["keep_every"]
        is_kept = every > 0 and number % every == 0
        seconds = min(50 * self.saving, 60 * self.settings["save_minutes"])
        is_due = all_sum(torch.zeros(1, device=self.device).fill_(self.is_due(seconds)))
        if not self.is_saved() and (is_due or is_kept or number == self.settings["epochs"]):
            self.save()
        if self.first and is_kept:
            kept = self.path(f"checkpoint-{number:04}.pth")
            with open(self.path(NEWEST), "rb") as newest, replacing(kept) as copy:
                shutil.copyfileobj(newest, copy)

    def save(self):
        """Write everything that the run needs to go on from here. Raises Refused if weights are not
        finite."""
        self.check_numbers()
        began = time.monotonic()
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        finite = [t.isfinite().all() for t in parts["model"].values()]
        if not torch.stack(finite).all():
            self.refuse("a weight")
        if self.first:
            checkpoint = {
                "format": FORMAT,
                **parts,
                "epoch": self.epoch,
                "step": self.step,
                "sums": self.sums.tolist(),
                "seconds": self.seconds,
                "waited": self.waited,
                "wall": began - self.began,
                "settings": self.settings,
            }
            # A damaged checkpoint must not take the place of the good one before it.
            keep = None if self.newest_is_damaged else self.path(PREVIOUS)
            save(checkpoint, self.path(NEWEST), keep)
            self.newest_is_damaged = False
        self.saved = time.monotonic()
        self.saving = self.saved - began
        self.saved_at = self.epoch, self.step

    def save_result(self, model, name):
        """Write a state dict with the run's settings, under the names that a checkpoint has for them."""
        save({"format": FORMAT, "model": model, "epoch": self.epoch, "step": 0, "settings": self.settings},
             self.path(name))

    # --- Where it is -------------------------------------------------------------------------------------

    def position(self):
        """How many steps of the whole run are done."""
        return self.epoch * self.steps_per_epoch + self.step

    def place(self):
        """Where the run is, for people."""
        return f"epoch {self.epoch + 1}/{self.settings['epochs']}  step {self.step}/{self.steps_per_epoch}"

    def rate(self):
        """Images a second, in this epoch so far."""
        return self.settings["batch"] * self.step / self.seconds

    def speed(self):
        """Of a finished epoch: images a second, the share of the time spent waiting for data, the seconds of
        its steps, and those since the epoch before, with saving and measuring.

        The last, added up, are what a person has waited for the run.
        """
        return {"images_per_s": self.rate(), "data_wait": self.waited / self.seconds,
                "seconds": self.seconds, "wall_seconds": time.monotonic() - self.began}

    def next_epoch(self):
        """Go to the beginning of the next epoch."""
        self.epoch += 1
        self.step = 0
        self.began = time.monotonic()
        self.seconds = 0.0
        self.waited = 0.0
        self.sums.zero_()

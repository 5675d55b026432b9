"""A run's report: the start block, a line and a record for each epoch, and the curves."""
import math
from typing import NamedTuple

from ..common.machine import hardware, peak_memory
from ..common.pictures import draw_curves
from ..training.recipes import own_steps, recipe_for
from .features import calibrated, if_unequal, neighbours, share_bad

LOW_RANK = 0.3    # of the untrained network's rank: healthy runs had at least 0.43 (docs/operations.md)
FEW_STEPS = 4000  # which a small data set needs (docs/own-data.md)
TOO_SHORT = ("on 1,000 to 5,000 images, 500 steps gained 1 to 3 points over the untrained network, 1,500 "
             "gained 7 to 11, and 4,000 gained 14 to 17 (docs/own-data.md)")

# What the log records of each epoch, besides its number and step. Null where there is no value.
RECORDED = ("loss", "std", "lr", "knn", "knn_balanced", "knn_largest_class", "knn_images", "rank",
            "images_per_s", "data_wait", "seconds", "wall_seconds", "memory_mb", "collapsed", "bad_images")


class Report(NamedTuple):
    """Measures a run, and reports it in the log, on the screen and in curves.png.

    watch       features (images -> (N, D)) -> {"knn": ..., "knn_images": ..., "rank": ..., ...}
    progress    a Progress, which prints the lines
    """

    run: object
    job: object
    method: object
    watch: object
    progress: object

    def untrained(self, encoder):
        """Epoch 0: kNN accuracy and rank of the network as it starts."""
        watched = {}
        if self.job.settings["knn_every"] > 0:
            watched = self.measured(calibrated(encoder, self.job.test_views, self.job.train))
        self.record(0, **watched)

    def epoch(self, encoder, optimizer):
        """An epoch that is done: its means, and kNN and rank if they are due."""
        s = self.job.settings
        number = self.run.epoch + 1
        loss, std = self.run.means
        watched = {}
        if s["knn_every"] > 0 and (number % s["knn_every"] == 0 or number == s["epochs"]):
            watched = self.measured(encoder)
        collapsed = self.method.collapsed(loss, std)
        self.warn_of_collapse(collapsed)
        self.warn_of_low_rank(watched.get("rank"))
        sources = [source for source in (self.job.train, self.job.val) if source]
        self.record(
            number,
            loss=loss,
            std=std,
            lr=optimizer.param_groups[0]["lr"],
            memory_mb=peak_memory(self.job.device),
            collapsed=collapsed,
            bad_images=sum(len(share_bad(source, self.job.device)) for source in sources),
            **watched,
            **self.run.speed())

    def measured(self, encoder):
        """How good an encoder is: {"knn": ..., "rank": ..., the method's own measures}"""
        encoder.eval()
        found = self.watch(self.run.unless_stopped(encoder.features))
        found |= self.method.measure(encoder, self.job)
        encoder.train()
        return found

    def warn_of_collapse(self, collapsed):
        """Say once that the run has collapsed."""
        if collapsed and not any(record["collapsed"] for record in self.run.log.epochs()):
            self.progress.line(
                "collapsed: all outputs are (nearly) the same vector. Try, in this order: a smaller "
                f"--base-lr; --warmup 10; a larger --batch; {self.method.REMEDY}; and look at views.png: "
                "are the images different from each other?")

    def warn_of_low_rank(self, rank):
        """Say once that the rank is far below the untrained network's. Loss and std may look healthy then."""
        epochs = self.run.log.epochs()
        bound = low_rank(epochs)
        earlier = [record["rank"] for record in epochs if record["rank"] is not None]
        if rank is not None and bound is not None and rank < bound <= min(earlier):
            self.progress.line(
                f"low rank: the features spread in {rank:.1f} directions, and did in {epochs[0]['rank']:.1f} "
                f"at the start; below {bound:.1f}, every run that we saw was far behind healthy ones, "
                "whatever its loss and std. Try a smaller --base-lr, then --warmup 10")

    def record(self, number, **measured):
        """An epoch's record: in the log, on the screen and, with each checkpoint, in the picture."""
        run = self.run
        values = dict.fromkeys(RECORDED + tuple(self.method.MEASURED)) | measured
        record = run.log.add("epoch", epoch=number, step=number * run.steps_per_epoch, **values)
        if run.first and run.is_saved():
            epochs = run.log.epochs()
            knn_pixels = run.log.records[0].get("knn_pixels")
            draw_curves(run.path("curves.png"), epochs, knn_pixels, self.method.minimum, low_rank(epochs))
        self.progress.line(self.line_of(record))

    def line_of(self, record):
        """A record as a line for the screen."""
        s = self.job.settings
        words = [f"epoch {record['epoch']}/{s['epochs']}"]
        if record["epoch"] == 0:
            started = "as loaded" if s["init"] else "untrained"
            words.append(f"{started} (with BN calibrated)")
        else:
            words.append(f"loss {record['loss']:.4f} (minimum {self.method.minimum:.4g})")
            words.append(f"std x sqrt(d) {record['std']:.3f}")
            words.append(f"lr {record['lr']:.4g}")
        if record["knn"] is not None:
            skew = if_unequal(record["knn"], record["knn_balanced"], record["knn_largest_class"])
            words.append(f"kNN {record['knn']:.2f}% of {record['knn_images']}{skew}")
        if record["rank"] is not None:
            words.append(f"rank {record['rank']:.1f}")
        for name in self.method.MEASURED:
            if record[name] is not None:
                words.append(f"{name.replace('_', ' ')} {record[name]:.2f}%")
        if record["epoch"] > 0:
            words.append(f"{record['images_per_s']:.0f} images/s")
            words.append(f"{record['data_wait']:.0%} waiting for data")
            words.append(f"{record['memory_mb']} MiB")
        return "  ".join(words)


def low_rank(epochs):
    """The rank below which we warn, by a log's epochs; None if the untrained network's is unknown."""
    if not epochs or epochs[0]["rank"] is None:
        return None
    return LOW_RANK * epochs[0]["rank"]


# --- The start block ---------------------------------------------------------------------------------------

def describe_run(job, method):
    """What to know about a run before it starts: {heading: text}."""
    s = job.settings
    recipe = recipe_for(s["data"], method.data.train, s["recipe"], method.SETTINGS)
    on_its_own = own_steps(s, method)
    changed = [f"{name} {s[name]} instead of {value}" for name, value in recipe.items() if s[name] != value]
    rows = {"recipe": ", ".join([s["recipe"], *changed])}
    if s["experiment"] != method.NAME:
        rows["experiment"] = describe_experiment(method)
    instead = "" if method.total_steps == on_its_own else f" (the recipe on its own data: {on_its_own:,})"
    rows["training"] = (
        f"{s['epochs']} epochs of {method.steps_per_epoch} steps, {method.total_steps:,} in all{instead}, "
        f"global batch {s['batch']}, lr {method.lr:.4g}")
    rows |= too_short(s, min(FEW_STEPS, on_its_own), TOO_SHORT)
    rows["processes"] = (
        f"{s['world']}, with {s['batch'] // s['world']} images per process, BN over {s['batch']}, "
        f"{hardware(s, job.device)}")
    rows["kNN"] = describe_knn(job)
    return rows | method.rows() | {"writes to": job.out}


def too_short(s, enough, why):
    """A row of the start block if these settings give fewer steps than enough: {} or {heading: text}"""
    steps_per_epoch = s["images"] // s["batch"]
    epochs = math.ceil(enough / steps_per_epoch)
    if s["epochs"] * steps_per_epoch >= enough:
        return {}
    return {"too short": f"{why}; --epochs {epochs}, or a smaller --batch, gives {enough:,}"}


def describe_experiment(method):
    """The experiment, the paper's result, and which of its values are others here."""
    s = method.s
    paper, changes = method.EXPERIMENTS[s["experiment"]]
    changes = changes | method.ON_IMAGENET.get(s["experiment"], {})
    text = f"{s['experiment']} (the paper on ImageNet: {paper})"
    scaled = [f"{name} {s[name]}" for name in changes if s[name] != changes[name]]
    if scaled:
        text += f"; here {', '.join(scaled)}, not what the row says"
    return text


def watches_knn(job):
    """Whether kNN is measured: it needs labels, and a validation image for each process."""
    s = job.settings
    return s["knn_every"] > 0 and job.val is not None and len(job.val) >= s["world"]


def describe_knn(job):
    """How often kNN is measured, with how many neighbours, and on what."""
    every = job.settings["knn_every"]
    if every == 0:
        return "none (--knn-every 0)"
    if not watches_knn(job):
        return f"none (it needs labels, and a val/ image for each process); the rank every {every} epochs"
    k = neighbours(len(job.train), len(job.train.classes), job.settings["knn_k"])
    return (f"every {every} epochs, k {k} (--knn-k, or a fifth of the average class, at most 200), on "
            f"{len(job.val):,} images from {job.val.where}")

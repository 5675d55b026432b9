"""What a run asks of a method of pre-training."""
import torch


class Method:
    """A method of pre-training: its tables, its model, its algorithm.

    An object belongs to one run, which calls build first; then, with the model on its device and its BN
    synchronised, optimizer and parts; set_lr and train_step for each step; measure now and then. What a
    method remembers from step to step must be among its parts, or a resumed run would lack it.

    NAME            of the method, and of the experiment that changes nothing
    SETTINGS        {setting: (type, its default in each recipe)}
    HELP            {setting: what it is}
    CHOICES         {setting: what it can be}
    IDLE            {setting: (another one, values of that one that leave the setting without effect)}
    ABLATIONS       the settings that only experiments need
    EXPERIMENTS     {name: (the paper's result, what changes)}
    ON_IMAGENET     {experiment: {setting: value}}: what else it changes, in ImageNet's recipe
    REMEDY          what to try against a collapse, after a smaller lr and more warm-up
    MEASURED        names of what `measure` finds, in percent
    views           how many views of an image a step takes
    minimum         of the loss, or a lower bound
    lr              the highest, after the warm-up

    It has these methods, and may replace those below:

    open(data, value_range, wanted)     DATA -> the data set that it trains on (opening.open_data); static
    build()                             make self.model, and return it. Its encoder is a ResNet
    optimizer()                         -> the optimiser, whose first group is the encoder's
    set_lr(optimizer, step)             set the lr, before each step
    train_step(network, optimizer, step, index, views)
                                        one step, on the views of the images `index` -> the loss, and the
                                        outputs whose std is monitored. network: the model, or its
                                        DistributedDataParallel
    collapsed(loss, std_sqrt_d)         whether an epoch of this mean loss and std x sqrt(d) shows a collapse
    """
    ON_IMAGENET = {}
    MEASURED = ()
    views = 2
    minimum = 0
    lr = None

    def __init__(self, s, data, device):
        """s: the settings of the run. data: the data set, with sources train and val"""
        self.s = s
        self.data = data
        self.device = device
        self.steps_per_epoch = s["images"] // s["batch"]
        self.total_steps = s["epochs"] * self.steps_per_epoch
        self.warmup_steps = s["warmup"] * self.steps_per_epoch
        self.model = None  # until it is built

    @property
    def autocast(self):
        """The precision of the forward passes: s is read late, because a resumed run keeps its precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.s["amp"])

    @staticmethod
    def check(s):
        """Raise Refused for settings of the method that conflict."""

    def parts(self):
        """What a checkpoint holds besides the model and the optimiser: {name: with a state_dict}"""
        return {}

    def measure(self, encoder, job):
        """What to measure along with kNN and rank, of an encoder in eval mode: {name in MEASURED: percent}"""
        return {}

    def numbers(self):
        """Numbers that must be the same on all processes, apart from those of the images."""
        return []

    def rows(self):
        """Rows of the start block about the method: {heading: text}"""
        return {}

"""--init: a run that starts from the weights in a file."""
from ..common.errors import Refused
from .weights import describe_found, find_resnet, load_strictly, name_groups, read_weights, whole_model


def load_init(model, s, prefix):
    """Start from the weights in the file s["init"], of a whole model or of a backbone -> what was taken.

    model   its `encoder` is a ResNet. Its heads are taken where the file has all of them
    s       the run's settings
    prefix  of the network in the file, see weights.find_resnet
    Raises Refused where the file doesn't fit.
    """
    path = s["init"]
    state, _, settings, _ = read_weights(path)
    found = find_resnet(state, path, prefix)
    there = {"arch": found.arch, "width": round(64 * found.width), "cifar_stem": found.cifar_stem}
    here = {"arch": s["arch"], "width": round(64 * s["width"]), "cifar_stem": s["cifar_stem"]}
    different = [f"{key} {there[key]}, not {here[key]}" for key in here if there[key] != here[key]]
    if different:
        raise Refused(f"--init {path}: another network than the run's: {', '.join(different)} (a width of 1 "
                      "is 64); see --arch, --width, --cifar-stem")
    around = whole_model(found, path)
    mine = model.state_dict()
    # A projector of more layers has all the names of a shorter one.
    same_encoder = names_of_encoder(mine) == names_of_encoder(around)
    same_captions = settings.get("captions") == s.get("captions")
    if same_encoder and same_captions and mine.keys() <= around.keys():
        load_strictly(model, {name: around[name] for name in mine}, f"--init {path}")
        others = [name for name in around if name not in mine]
        return f"{path}, all of it but {', '.join(name_groups(others))}" if others else f"{path}, all of it"
    backbone = {name: t for name, t in model.encoder.state_dict().items() if name.startswith("fc.")}
    load_strictly(model.encoder, backbone | found.tensors, f"--init {path}")
    return f"{path}, the backbone; the heads are new ({describe_found(found, path)})"


def names_of_encoder(state):
    """The names of the encoder's tensors among these."""
    return {name for name in state if name.startswith("encoder.")}
